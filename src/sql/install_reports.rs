//! Privileges and comments of the reports and exports.

use pgrx::extension_sql;

extension_sql!(
    r#"
REVOKE ALL ON FUNCTION rheap_report(int), rheap_folded(int, text), rheap_flamegraph(int, text), rheap_html(int), rheap_pprof(int), rheap_heaptrack(int), rheap_track(int, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION rheap_report(int), rheap_folded(int, text), rheap_flamegraph(int, text), rheap_html(int), rheap_pprof(int), rheap_heaptrack(int) TO pg_monitor;

COMMENT ON FUNCTION rheap_report(int) IS 'a report for a terminal: leaks, what holds most, most calls, most temporary allocations, totals, contexts';
COMMENT ON FUNCTION rheap_folded(int, text) IS 'collapsed stacks for flame graph tools; metric: live, live_count, allocated, allocations, temporary or growth';
COMMENT ON FUNCTION rheap_flamegraph(int, text) IS 'a flame graph as SVG; metric: live, live_count, allocated, allocations, temporary or growth';
COMMENT ON FUNCTION rheap_html(int) IS 'one self-contained page: leaks, growth charts, flame graph, call sites, processes';
COMMENT ON FUNCTION rheap_pprof(int) IS 'gzipped profile.proto with alloc and inuse samples, for go tool pprof and the like';
COMMENT ON FUNCTION rheap_heaptrack(int) IS 'a data file of heaptrack, for heaptrack_print and heaptrack_gui';
COMMENT ON FUNCTION rheap_track(int, text) IS 'let one process record in a mode of its own while it runs: off, sampled, exact, or default';
"#,
    name = "reports_privileges_comments",
    requires = [rheap_report, rheap_folded, rheap_flamegraph, rheap_html, rheap_pprof, rheap_heaptrack, rheap_track]
);
