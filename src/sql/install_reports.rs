//! Privileges and comments of the reports and exports.

use pgrx::extension_sql;

extension_sql!(
    r#"
REVOKE ALL ON FUNCTION rheap_folded(int, text), rheap_flamegraph(int, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION rheap_folded(int, text), rheap_flamegraph(int, text) TO pg_monitor;

COMMENT ON FUNCTION rheap_folded(int, text) IS 'collapsed stacks for flame graph tools; metric: live, live_count, allocated, allocations, temporary or growth';
COMMENT ON FUNCTION rheap_flamegraph(int, text) IS 'a flame graph as SVG; metric: live, live_count, allocated, allocations, temporary or growth';
"#,
    name = "reports_privileges_comments",
    requires = [super::exports::rheap_folded, super::exports::rheap_flamegraph]
);
