//! Caches that the server is known to fill as it meets new objects. Each with its reason; none of them for ever: what
//! outgrows its own history is judged like everything else.

use crate::symbols::Frame;

/// (part of the context path, what it is)
const CACHES: &[(&str, &str)] = &[
    (
        "TopMemoryContext/CacheMemoryContext",
        "the server's caches of catalogs, relations and plans fill as objects are used",
    ),
    ("TopMemoryContext/Type information cache", "the type cache fills as types are used"),
    ("TopMemoryContext/TableSpace cache", "the tablespace cache fills once"),
    ("TopMemoryContext/Operator lookup cache", "the operator cache fills as operators are used"),
    ("TopMemoryContext/Relcache by OID", "the relation cache fills as relations are used"),
    ("TopMemoryContext/LOCALLOCK hash", "the table of local locks grows to the largest transaction"),
    ("TopMemoryContext/smgr relation table", "one entry for each file that is open"),
    ("TopMemoryContext/TopPortalContext", "portals end with their transaction or cursor"),
    ("TopMemoryContext/LocalBufferContext", "the buffers of temporary tables are made once"),
    ("TopMemoryContext/Prepared Queries", "one entry for each prepared statement"),
    (
        "TopMemoryContext/Pending ops context",
        "requests wait for the next checkpoint, and their table keeps its largest size",
    ),
    ("TopMemoryContext/dynahash", "hash tables of the server grow by doubling"),
];

pub fn known(path: &str) -> Option<&'static str> {
    CACHES
        .iter()
        .find(|(cache, _)| path.strip_prefix(cache).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
        .map(|&(_, why)| why)
}

/// (function, what it keeps until the transaction ends)
const UNTIL_TRANSACTION_END: &[(&str, &str)] = &[
    ("LockAcquireExtended", "a lock of each object that was used"),
    ("RelationCreateStorage", "a file to remove if the transaction fails"),
    ("RelationDropStorage", "a file to remove if it does not"),
    ("RelationClearRelation", "row descriptors that somebody may still look at"),
    ("RelationBuildLocalRelation", "what is known of a relation that was made and dropped"),
    ("RelationInitIndexAccessInfo", "what is known of an index that was made and dropped"),
    ("RelationDestroyRelation", "row descriptors that somebody may still look at"),
    ("RememberToFreeTupleDescAtEOX", "row descriptors that somebody may still look at"),
    ("ReadBuffer_common", "a pin"),
    ("smgropen", "a file that is open"),
    ("pgstat_prep_pending_entry", "counters that are sent when the transaction has ended"),
    ("RegisterSnapshotOnOwner", "a snapshot in use"),
];

/// Whether what a stack has allocated is given back when the transaction ends, as its innermost named functions tell.
pub fn ends_with_transaction(path: &str, frames: &[Frame]) -> bool {
    path == "TopMemoryContext/LOCALLOCK hash"
        || path == "TopMemoryContext/CacheMemoryContext/index info"
        || frames
            .iter()
            .take(8)
            .filter_map(|f| f.function.as_deref())
            .any(|function| UNTIL_TRANSACTION_END.iter().any(|&(known, _)| known == function))
}
