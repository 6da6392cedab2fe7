//! Why memory may grow that is no leak: caches that the server is known to fill as it meets new objects, and what it
//! keeps until a transaction ends. By function, each with its reason and with the number of objects up to which it is
//! believed; what outgrows that is judged like everything else.

use crate::symbols::Frame;
use crate::symbols::helpers::{innermost, is_helper, looks_up};

struct Known {
    /// One of the innermost frames; `*` at the end stands for any more text.
    functions: &'static [&'static str],
    /// So many of one process are a cache.
    objects: u64,
    why: &'static str,
}

const CACHES: &[Known] = &[
    Known {
        functions: &[
            "SearchCatCache*",
            "SearchSysCache*",
            "GetSysCache*",
            "CatalogCacheCreateEntry",
            "CatalogCacheInitializeCache",
            "InitCatCache",
            "InitCatalogCache",
            "RehashCatCache*",
        ],
        objects: 65_536,
        why: "the server's caches of catalogs fill as objects are used",
    },
    Known {
        functions: &[
            "RelationBuild*",
            "RelationIdGetRelation",
            "RelationGet*",
            "RelationInit*",
            "RelationParseRelOptions",
            "RelationClearRelation",
            "RelationRebuildRelation",
            "RelationCacheInitialize*",
            "load_relcache_init_file",
            "AllocateRelationDesc",
            "formrdesc",
            "CopyIndexAttOptions",
            "index_getprocinfo",
            "index_opclass_options",
            "set_fn_opclass_options",
            "_bt_getroot",
            "_bt_getrootheight",
            "_bt_metaversion",
            "_hash_getcachedmetap",
            "spgGetCache",
            "ri_FetchConstraintInfo",
            "ri_LoadConstraintInfo",
            "ri_FetchPreparedPlan",
            "ri_HashPreparedPlan",
            "ri_HashCompareOp",
            "ri_InitHashTables",
        ],
        objects: 65_536,
        why: "the server's cache of relations fills as tables and indexes are used",
    },
    Known {
        functions: &[
            "lookup_type_cache",
            "lookup_rowtype_tupdesc*",
            "assign_record_type_typmod",
            "cache_record_field_properties",
            "load_typcache_tupdesc",
            "load_enum_cache_data",
            "oper",
            "left_oper",
            "find_oper_cache_entry",
            "make_oper_cache_entry",
        ],
        objects: 256,
        why: "the server's caches of types and operators fill as they are used",
    },
    Known {
        functions: &[
            "plpgsql_compile",
            "do_compile",
            "compile_plperl_function",
            "PLy_procedure_get",
            "compile_pltcl_function",
        ],
        objects: 256,
        why: "a function is compiled once and kept for the session",
    },
    Known {
        functions: &["SPI_prepare*", "SPI_keepplan", "SPI_saveplan", "GetCachedPlan", "init_sql_fcache", "fmgr_sql"],
        objects: 2048,
        why: "plans are kept for the session",
    },
    Known { functions: &["exec_parse_message"], objects: 256, why: "drivers keep a number of prepared statements" },
    Known {
        functions: &["RE_compile_and_cache"],
        // An expression is of many pieces.
        objects: 1024,
        why: "compiled regular expressions are kept, 32 of them",
    },
    Known {
        functions: &[
            "LockAcquireExtended",
            "ResourceOwnerCreate",
            "ResourceOwnerEnlarge*",
            "smgropen",
            "mdopenfork",
            "PathNameOpenFile*",
            "AllocateVfd",
            "pgstat_prep_pending_entry",
            "pgstat_get_entry_ref",
            "GetLocalBufferStorage",
            "InitLocalBuffers",
            "ExtendBufferedRelLocal",
            "LocalBufferAlloc",
            "CreatePortal",
            "RegisterSyncRequest",
            "RememberSyncRequest",
            "Exec_ListenCommit",
            "ReservePrivateRefCountEntry",
        ],
        objects: 4096,
        why: "a table of what is in use keeps its largest size",
    },
];

/// So many frames from the culprit on may be the server's own work for the function that is looked for.
const NEAR: usize = 10;

/// The names up to there. What only allocates for its caller does not count: a tree that is read or copied recurses.
fn near(frames: &[Frame]) -> impl Iterator<Item = &str> {
    let mut own = 0;
    let near = frames.iter().take_while(move |f| {
        own += !f.function.as_deref().is_some_and(is_helper) as usize;
        own <= NEAR
    });
    near.filter_map(|f| f.function.as_deref())
}

/// Fewer surviving generations than this are a cache that fills fast.
const HABIT: u32 = 12;

/// Why what a stack allocates is no leak yet, of which a process has so many objects of so many generations.
pub fn known(path: &str, frames: &[Frame], objects: u64, generations: u32) -> Option<&'static str> {
    let mut cache = None;
    for name in near(frames) {
        // A statement of the user's, not a plan of the server's.
        if name == "PrepareQuery" {
            return None;
        }
        cache = cache.or_else(|| CACHES.iter().find(|known| known.functions.iter().any(|f| is(f, name))));
    }
    let cache = cache.or_else(|| is_nameless_cache(path, frames).then_some(&CACHES[0]));
    cache.filter(|known| objects <= known.objects || generations < HABIT).map(|known| known.why)
}

/// Whether static functions of a stripped server have allocated it, where nobody but the server's caches does: the look-ups
/// in catalogs and the triggers of foreign keys call each other in a way that leaves no exported name on the stack.
fn is_nameless_cache(path: &str, frames: &[Frame]) -> bool {
    PLACES[..2].contains(&path) && is_nameless(frames) || PLACES[0] == path && is_in_look_up(frames)
}

/// Whether static functions of a stripped server have allocated it for one of its functions that look a name up.
fn is_in_look_up(frames: &[Frame]) -> bool {
    let inner = frames.iter().position(|f| !f.function.as_deref().is_some_and(is_helper)).map(|at| &frames[at..]);
    inner.is_some_and(|inner| {
        inner[0].address.starts_with("postgres+")
            && inner.iter().find_map(|f| f.function.as_deref()).is_some_and(looks_up)
    })
}

/// Whether a function of a stripped server that has no exported name is the culprit.
pub fn is_nameless(frames: &[Frame]) -> bool {
    frames.get(innermost(frames)).is_some_and(|f| f.function.is_none() && f.address.starts_with("postgres+"))
}

fn is(function: &str, name: &str) -> bool {
    match function.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        // gcc names parts and clones of a function so.
        None => name.split('.').next() == Some(function),
    }
}

/// Where the server's caches lie, for those who have no names of functions: (part of the context path).
const PLACES: &[&str] =
    &["TopMemoryContext/CacheMemoryContext", "TopMemoryContext/dynahash", "TopMemoryContext/TopPortalContext"];
/// What is there must outgrow this many generations.
const PLACE_HABIT: u32 = 64;

/// Whether something that lies below such a path may be a cache, as far as that can be told without its call stack.
pub fn may_be_cache(path: &str, generations: u32) -> bool {
    let below = |place: &str| path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
    generations < PLACE_HABIT && PLACES.iter().any(|place| below(place))
}

/// (function, what it keeps until the transaction ends)
const UNTIL_TRANSACTION_END: &[(&str, &str)] = &[
    ("LockAcquireExtended", "a lock of each object that was used"),
    ("ResourceOwnerCreate", "what a subtransaction has to give back"),
    ("ResourceOwnerEnlarge", "what the transaction has to give back"),
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
    ("CreatePortal", "a cursor"),
    ("llvm_create_context", "what was compiled for a statement that runs"),
    ("llvm_get_function", "what was compiled for a statement that runs"),
    ("tuplesort_put*", "the rows that a cursor sorts"),
    ("tuplestore_put*", "the rows that a cursor has read"),
    ("ExecHashTableInsert", "the rows that a cursor joins"),
    ("LookupTupleHashEntry*", "the groups of rows of a cursor"),
    ("tbm_*", "which rows a cursor reads"),
    ("initArrayResult*", GATHERED),
    ("accumArrayResult*", GATHERED),
    ("string_agg_transfn", GATHERED),
    ("bytea_string_agg_transfn", GATHERED),
    ("json_agg_*", GATHERED),
    ("json_object_agg_*", GATHERED),
    ("jsonb_agg_*", GATHERED),
    ("jsonb_object_agg_*", GATHERED),
];

const GATHERED: &str = "what an aggregate has gathered";

/// Whether contexts of a path are made with a relation that is made, and go when its transaction ends.
pub fn goes_with_relation(path: &str) -> bool {
    path == "TopMemoryContext/CacheMemoryContext/index info"
}

/// What a stack has allocated that is given back when the transaction ends, as its innermost named functions tell.
pub fn until_transaction_ends(frames: &[Frame]) -> Option<&'static str> {
    near(frames)
        .find_map(|name| UNTIL_TRANSACTION_END.iter().find(|&(known, _)| is(known, name)))
        .map(|&(_, what)| what)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stack(functions: &[&str]) -> Vec<Frame> {
        functions
            .iter()
            .map(|&f| Frame {
                function: (f != "?").then(|| f.into()),
                location: String::new(),
                address: "postgres+0x1".into(),
            })
            .collect()
    }

    #[test]
    fn a_cache_is_known_by_its_function_until_it_outgrows_itself() {
        let relcache = stack(&["palloc0", "?", "RelationBuildDesc", "RelationIdGetRelation", "relation_open"]);
        assert!(known(PLACES[0], &relcache, 500, 500).is_some());
        assert!(known(PLACES[0], &relcache, 100_000, 11).is_some(), "many at a time");
        assert_eq!(known(PLACES[0], &relcache, 100_000, 12), None);
        let mut rule = vec!["palloc"];
        rule.extend(["parseNodeString", "_readQuery", "nodeRead"].repeat(5));
        rule.extend(["stringToNode", "RelationBuildRuleLock"]);
        assert!(known(PLACES[0], &stack(&rule), 4, 40).is_some(), "however deep the tree");
        assert!(
            known(
                PLACES[0],
                &stack(&["MemoryContextAlloc", "SearchCatCacheMiss.constprop.0", "SearchCatCache1"]),
                10,
                10
            )
            .is_some()
        );
    }

    #[test]
    fn what_an_extension_keeps_in_the_same_context_is_no_cache() {
        let mut far = vec!["MemoryContextAlloc", "my_extension_leak", "ExecInterpExpr"];
        far.extend(["?"; NEAR]);
        far.push("GetCachedPlan");
        assert_eq!(known(PLACES[0], &stack(&far), 10, 10), None);
        let prepared =
            stack(&["palloc", "copyObjectImpl", "CreateCachedPlan", "PrepareQuery", "standard_ProcessUtility"]);
        assert_eq!(known(PLACES[0], &prepared, 10, 10), None, "the application's own");
    }

    #[test]
    fn a_cache_of_a_stripped_server_is_known_by_its_place() {
        let stripped = stack(&["palloc", "?", "?", "find_coercion_pathway"]);
        assert!(known(PLACES[0], &stripped, 10, 100).is_some());
        let table = ["MemoryContextAlloc", "?", "hash_search_with_hash_value", "?", "AfterTriggerEndQuery"];
        assert!(known("TopMemoryContext/dynahash", &stack(&table), 10, 100).is_some());
        let of_an_extension = ["MemoryContextAlloc", "?", "hash_search", "my_extension_leak", "ExecInterpExpr"];
        assert_eq!(known("TopMemoryContext/dynahash", &stack(&of_an_extension), 10, 100), None);
        assert_eq!(known("TopMemoryContext", &stripped, 10, 100), None);
        let name = ["pstrdup", "?", "?", "get_namespace_name_or_temp", "format_type_extended", "format_type"];
        assert!(known(PLACES[0], &stack(&name), 10, 100).is_some());
        assert_eq!(known("TopMemoryContext", &stack(&name), 10, 100), None);
        assert_eq!(known(PLACES[0], &stack(&["pstrdup", "get_rel_name", "my_extension_leak"]), 10, 100), None);
        assert_eq!(known(PLACES[0], &stack(&["palloc", "?", "lappend", "my_extension_leak"]), 10, 100), None);
        let mut extension = stripped.clone();
        extension[1].address = "my_extension+0x17".into();
        assert_eq!(known(PLACES[0], &extension, 10, 100), None);
    }

    #[test]
    fn places_are_whole_names() {
        assert!(may_be_cache("TopMemoryContext/CacheMemoryContext/CachedPlan", 30));
        assert!(!may_be_cache("TopMemoryContext/CacheMemoryContext/CachedPlan", 64));
        assert!(!may_be_cache("TopMemoryContext/CacheMemoryContextual", 1) && !may_be_cache("TopMemoryContext", 1));
    }

    #[test]
    fn what_a_transaction_gives_back_is_known() {
        assert_eq!(
            until_transaction_ends(&stack(&["hash_search", "LockAcquireExtended", "LockRelationOid"])),
            Some("a lock of each object that was used")
        );
        let cursor = stack(&["palloc", "ExecCopySlotMinimalTuple", "tuplestore_puttupleslot", "ExecMaterial"]);
        assert_eq!(until_transaction_ends(&cursor), Some("the rows that a cursor has read"));
        let array = stack(&["repalloc", "accumArrayResult", "array_agg_transfn", "?"]);
        assert_eq!(until_transaction_ends(&array), Some("what an aggregate has gathered"));
        assert_eq!(until_transaction_ends(&stack(&["palloc", "drandom"])), None);
    }
}
