//! Functions that allocate on behalf of their caller. The culprit of a leak is the innermost frame that is none of
//! these. By exported names, so that it holds on stripped servers too; easy to extend.

/// The allocator itself: what rheap counts the calls of.
const ALLOCATOR: &[&str] = &[
    "palloc",
    "palloc0",
    "palloc_extended",
    "palloc_aligned",
    "repalloc",
    "repalloc0",
    "repalloc_huge",
    "repalloc_extended",
];

/// Beginnings of the names of its functions.
const ALLOCATOR_PREFIXES: &[&str] = &["MemoryContext", "AllocSet", "Generation", "Slab", "Bump"];

/// Exact names.
const NAMES: &[&str] = &[
    "pstrdup",
    "pnstrdup",
    "pchomp",
    "psprintf",
    "pvsnprintf",
    "guc_malloc",
    "guc_realloc",
    "guc_strdup",
    "copyObjectImpl",
    "datumCopy",
    "datumTransfer",
    "newNode",
    "lappend",
    "lappend_int",
    "lappend_oid",
    "lcons",
    "lcons_int",
    "lcons_oid",
    "list_concat",
    "list_copy",
    "list_copy_deep",
    "list_make1_impl",
    "list_make2_impl",
    "list_make3_impl",
    "list_make4_impl",
    "list_make5_impl",
    "new_list",
    "enlarge_list",
    "new_tail_cell",
    "new_head_cell",
    "makeStringInfo",
    "initStringInfo",
    "enlargeStringInfo",
    "appendStringInfo",
    "appendStringInfoVA",
    "appendStringInfoString",
    "appendStringInfoChar",
    "appendBinaryStringInfo",
    "makeStringInfoExt",
    "hash_create",
    "hash_search",
    "hash_search_with_hash_value",
    "DynaHashAlloc",
    "element_alloc",
    "seg_alloc",
    "get_hash_entry",
    "expand_table",
    "init_htab",
    "dir_realloc",
    "cstring_to_text",
    "cstring_to_text_with_len",
    "text_to_cstring",
    "heap_copytuple",
    "heap_form_tuple",
    "heap_copy_tuple_as_datum",
    "heap_form_minimal_tuple",
    "heap_copy_minimal_tuple",
    "minimal_tuple_from_heap_tuple",
    "CreateTemplateTupleDesc",
    "CreateTupleDescCopy",
    "CreateTupleDescCopyConstr",
    "construct_array",
    "construct_md_array",
    "bms_copy",
    "bms_make_singleton",
    "bms_add_member",
    "bms_add_members",
    "bms_union",
    "PG_detoast_datum",
    "detoast_attr",
    "pg_detoast_datum",
    "pg_detoast_datum_copy",
    "pg_detoast_datum_packed",
    "malloc",
    "calloc",
    "realloc",
    "strdup",
    "operator new",
];

/// Beginnings of names.
const PREFIXES: &[&str] =
    &["_copy", "simplehash_", "pgrx::", "pgrx_pg_sys::", "alloc::", "core::", "<alloc::", "<core::"];

/// Whether a function is the allocator's own.
pub fn is_allocator(function: &str) -> bool {
    ALLOCATOR.contains(&function) || ALLOCATOR_PREFIXES.iter().any(|p| function.starts_with(p))
}

/// Whether a function allocates only on behalf of its caller.
pub fn is_helper(function: &str) -> bool {
    is_allocator(function) || NAMES.contains(&function) || PREFIXES.iter().any(|p| function.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::is_helper;

    #[test]
    fn helpers_are_known_and_culprits_are_not() {
        for helper in ["palloc", "MemoryContextAllocZero", "lappend", "AllocSetContextCreateInternal"] {
            assert!(is_helper(helper), "{helper}");
        }
        for culprit in ["drandom", "BackendStartup", "ExecInitNode", "pallocator", "list_files"] {
            assert!(!is_helper(culprit), "{culprit}");
        }
    }
}
