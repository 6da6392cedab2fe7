//! Functions that allocate on behalf of their caller. The culprit of a leak is the innermost frame that is none of
//! these. By exported names, so that it holds on stripped servers too; easy to extend.

use super::Frame;

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
    // Strings.
    "pstrdup",
    "pnstrdup",
    "pchomp",
    "psprintf",
    "pvsnprintf",
    "makeStringInfo",
    "makeStringInfoExt",
    "makeStringInfoInternal",
    "initStringInfo",
    "initStringInfoExt",
    "initStringInfoInternal",
    "enlargeStringInfo",
    "appendStringInfo",
    "appendStringInfoVA",
    "appendStringInfoString",
    "appendStringInfoChar",
    "appendStringInfoSpaces",
    "appendBinaryStringInfo",
    "appendBinaryStringInfoNT",
    "cstring_to_text",
    "cstring_to_text_with_len",
    "text_to_cstring",
    "escape_json",
    "quote_identifier",
    "quote_qualified_identifier",
    "quote_literal_cstr",
    "NameListToString",
    "NameListToQuotedString",
    "downcase_identifier",
    "downcase_truncate_identifier",
    "SplitIdentifierString",
    "SplitGUCList",
    "SplitDirectoriesString",
    "stringToQualifiedNameList",
    "textToQualifiedNameList",
    "str_tolower",
    "str_toupper",
    "str_initcap",
    "pq_beginmessage",
    "pq_begintypsend",
    "pq_endtypsend",
    "pq_sendbytes",
    "pg_server_to_client",
    "pg_client_to_server",
    "pg_any_to_server",
    "pg_server_to_any",
    "pg_do_encoding_conversion",
    "perform_default_encoding_conversion",
    "guc_malloc",
    "guc_realloc",
    "guc_strdup",
    // Copies.
    "copyObjectImpl",
    "datumCopy",
    "datumTransfer",
    "SPI_palloc",
    "SPI_repalloc",
    "SPI_datumTransfer",
    "SPI_copytuple",
    "SPI_returntuple",
    "SPI_modifytuple",
    "SPI_getvalue",
    "SPI_fname",
    "pg_detoast_datum",
    "pg_detoast_datum_copy",
    "pg_detoast_datum_slice",
    "pg_detoast_datum_packed",
    "detoast_attr",
    "detoast_attr_slice",
    "detoast_external_attr",
    "toast_fetch_datum",
    "toast_fetch_datum_slice",
    "toast_decompress_datum",
    "toast_decompress_datum_slice",
    "toast_compress_datum",
    "pglz_decompress_datum",
    "pglz_compress_datum",
    "lz4_decompress_datum",
    "lz4_compress_datum",
    "toast_flatten_tuple",
    "toast_flatten_tuple_to_datum",
    "CopyTriggerDesc",
    // Tuples and their descriptors.
    "heap_copytuple",
    "heap_copytuple_with_tuple",
    "heap_copy_tuple_as_datum",
    "heap_form_tuple",
    "heap_modify_tuple",
    "heap_modify_tuple_by_cols",
    "heap_expand_tuple",
    "heap_form_minimal_tuple",
    "heap_copy_minimal_tuple",
    "heap_tuple_from_minimal_tuple",
    "minimal_tuple_from_heap_tuple",
    "minimal_expand_tuple",
    "ExecFetchSlotHeapTuple",
    "ExecFetchSlotMinimalTuple",
    "BuildTupleFromCStrings",
    "CreateTemplateTupleDesc",
    "CreateTupleDesc",
    "CreateTupleDescCopy",
    "CreateTupleDescCopyConstr",
    // Lists and sets.
    "new_list",
    "enlarge_list",
    "new_tail_cell",
    "new_head_cell",
    "lappend",
    "lappend_int",
    "lappend_oid",
    "lappend_xid",
    "lcons",
    "lcons_int",
    "lcons_oid",
    "list_make1_impl",
    "list_make2_impl",
    "list_make3_impl",
    "list_make4_impl",
    "list_make5_impl",
    "list_concat",
    "list_concat_copy",
    "list_concat_unique",
    "list_concat_unique_ptr",
    "list_concat_unique_int",
    "list_concat_unique_oid",
    "list_append_unique",
    "list_append_unique_ptr",
    "list_append_unique_int",
    "list_append_unique_oid",
    "list_union",
    "list_union_ptr",
    "list_union_int",
    "list_union_oid",
    "list_intersection",
    "list_intersection_int",
    "list_difference",
    "list_difference_ptr",
    "list_difference_int",
    "list_difference_oid",
    "list_insert_nth",
    "list_insert_nth_int",
    "list_insert_nth_oid",
    "insert_new_cell",
    "list_copy",
    "list_copy_head",
    "list_copy_tail",
    "list_copy_deep",
    // Nodes of parse trees.
    "newNode",
    "makeA_Expr",
    "makeSimpleA_Expr",
    "makeVar",
    "makeVarFromTargetEntry",
    "makeWholeRowVar",
    "makeTargetEntry",
    "flatCopyTargetEntry",
    "makeFromExpr",
    "makeConst",
    "makeNullConst",
    "makeBoolConst",
    "makeBoolExpr",
    "makeAlias",
    "makeRelabelType",
    "makeRangeVar",
    "makeTypeName",
    "makeTypeNameFromNameList",
    "makeTypeNameFromOid",
    "makeColumnDef",
    "makeFuncExpr",
    "makeDefElem",
    "makeDefElemExtended",
    "makeFuncCall",
    "make_opclause",
    "makeGroupingSet",
    "makeVacuumRelation",
    "makeInteger",
    "makeFloat",
    "makeBoolean",
    "makeString",
    "makeBitString",
    "base_yyparse",
    "base_yylex",
    "core_yylex",
    "raw_parser",
    "scanner_init",
    "litbufdup",
    "addlit",
    "addlitchar",
    "stringToNode",
    "stringToNodeInternal",
    "stringToNodeWithLocations",
    "nodeRead",
    "pg_strtok",
    "debackslash",
    "parseNodeString",
    "readDatum",
    "readBitmapset",
    "nodeToString",
    // Hash tables, heaps, trees.
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
    "choose_nelem_alloc",
    "binaryheap_allocate",
    "pairingheap_allocate",
    "rbt_create",
    "rbt_insert",
    "intset_create",
    "intset_add_member",
    "bloom_create",
    // Arrays.
    "construct_array",
    "construct_array_builtin",
    "construct_md_array",
    "construct_empty_array",
    "construct_empty_expanded_array",
    "expand_array",
    "deconstruct_array",
    "deconstruct_array_builtin",
    "create_array_envelope",
    "initArrayResult",
    "initArrayResultArr",
    "initArrayResultAny",
    "initArrayResultWithSize",
    "accumArrayResult",
    "accumArrayResultArr",
    "accumArrayResultAny",
    "makeArrayResult",
    "makeMdArrayResult",
    "makeArrayResultArr",
    "makeArrayResultAny",
    "array_set_element",
    // Other languages.
    "malloc",
    "calloc",
    "realloc",
    "strdup",
];

/// Names of objects, by what the catalogs say: a look-up may fill the server's caches.
const LOOK_UPS: &[&str] = &[
    "format_type_be",
    "format_type_be_qualified",
    "format_type_extended",
    "format_type_with_typemod",
    "get_rel_name",
    "get_namespace_name",
    "get_namespace_name_or_temp",
    "get_func_name",
    "get_attname",
    "get_opname",
    "get_constraint_name",
    "get_database_name",
    "get_tablespace_name",
    "GetUserNameFromId",
    "SPI_gettype",
    "SPI_getrelname",
    "SPI_getnspname",
];

/// Beginnings of names: those of nodes' copy and read functions, of sets, of stores of tuples, and what templates make.
const PREFIXES: &[&str] = &[
    "_copy",
    "_read",
    "bms_",
    "make_expanded_record_from_",
    "operator new",
    "pagetable_",
    "simplehash_",
    "tts_",
    "tuplehash_",
    "tuplestore_",
    "<alloc::",
    "<core::",
    "<hashbrown::",
    "<std::",
    "alloc::",
    "core::",
    "hashbrown::",
    "pgrx::",
    "pgrx_pg_sys::",
    "std::",
];

/// Whether a function is the allocator's own.
pub fn is_allocator(function: &str) -> bool {
    ALLOCATOR.contains(&function) || ALLOCATOR_PREFIXES.iter().any(|p| function.starts_with(p))
}

/// Whether a function allocates only on behalf of its caller.
pub fn is_helper(function: &str) -> bool {
    is_allocator(function)
        || NAMES.contains(&function)
        || LOOK_UPS.contains(&function)
        || PREFIXES.iter().any(|p| function.starts_with(p))
}

/// Whether a function asks the catalogs for the name of an object.
pub fn looks_up(function: &str) -> bool {
    LOOK_UPS.contains(&function)
}

/// Functions without a name that a helper has called are its own, on stripped servers: so many at most.
const NAMELESS: usize = 3;

/// The index of the innermost frame that does not only allocate for its caller.
pub fn innermost(frames: &[Frame]) -> usize {
    let helps = |f: &Frame| f.function.as_deref().is_some_and(is_helper);
    let mut at = 0;
    loop {
        let nameless = frames[at..].iter().take_while(|f| f.function.is_none()).take(NAMELESS).count();
        match frames.get(at + nameless) {
            Some(frame) if helps(frame) => at += nameless + 1,
            Some(_) => return at,
            // Helpers all the way: the one that allocates says most.
            None => return 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::is_helper;

    #[test]
    fn helpers_are_known_and_culprits_are_not() {
        for helper in [
            "palloc",
            "MemoryContextAllocZero",
            "AllocSetContextCreateInternal",
            "lappend",
            "_copyQuery",
            "bms_add_range",
            "SPI_copytuple",
            "tuplestore_puttuple_common",
        ] {
            assert!(is_helper(helper), "{helper}");
        }
        for culprit in ["drandom", "BackendStartup", "ExecInitNode", "pallocator", "list_files", "SPI_prepare"] {
            assert!(!is_helper(culprit), "{culprit}");
        }
    }
}
