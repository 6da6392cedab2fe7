pub mod ledger;
pub mod share;
pub mod stack;
