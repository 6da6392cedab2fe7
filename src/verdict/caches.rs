//! Caches that the server is known to fill as it meets new objects. Each with its reason; none of them for ever: what
//! outgrows its own history is judged like everything else.

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
