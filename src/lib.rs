pub mod ledger;
pub mod share;
