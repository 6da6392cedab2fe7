//! Views, privileges and comments of the reports and exports. What changes state has no view: tools that read every view
//! of a database must not reset anything, nor fill tables.

use pgrx::extension_sql;

extension_sql!(
    r#"
CREATE VIEW rheap_report AS SELECT * FROM rheap_report();
CREATE VIEW rheap_report_json AS SELECT * FROM rheap_report_json();
CREATE VIEW rheap_folded AS SELECT * FROM rheap_folded();
CREATE VIEW rheap_flamegraph AS SELECT * FROM rheap_flamegraph();
CREATE VIEW rheap_html AS SELECT * FROM rheap_html();
CREATE VIEW rheap_pprof AS SELECT * FROM rheap_pprof();

REVOKE ALL ON FUNCTION rheap_report(int), rheap_folded(int, text), rheap_flamegraph(int, text), rheap_html(int), rheap_pprof(int), rheap_heaptrack(int), rheap_track(int, text) FROM PUBLIC;
GRANT EXECUTE ON FUNCTION rheap_report(int), rheap_folded(int, text), rheap_flamegraph(int, text), rheap_html(int), rheap_pprof(int), rheap_heaptrack(int) TO pg_monitor;
REVOKE ALL ON rheap_report, rheap_report_json, rheap_folded, rheap_flamegraph, rheap_html, rheap_pprof FROM PUBLIC;
GRANT SELECT ON rheap_report, rheap_report_json, rheap_folded, rheap_flamegraph, rheap_html, rheap_pprof TO pg_monitor;

COMMENT ON VIEW rheap_report IS 'a report for a terminal of all live processes';
COMMENT ON VIEW rheap_report_json IS 'the leaks, call sites, contexts and processes as one JSON document';
COMMENT ON VIEW rheap_folded IS 'collapsed stacks of live bytes of all live processes';
COMMENT ON VIEW rheap_flamegraph IS 'a flame graph of live bytes of all live processes, as SVG';
COMMENT ON VIEW rheap_html IS 'one self-contained page about all live processes';
COMMENT ON VIEW rheap_pprof IS 'gzipped profile.proto of all live processes';
COMMENT ON FUNCTION rheap_report(int) IS 'a report for a terminal: leaks, what holds most, most calls, most temporary allocations, totals, contexts';
COMMENT ON FUNCTION rheap_folded(int, text) IS 'collapsed stacks for flame graph tools; metric: live, live_count, allocated, allocations, temporary or growth';
COMMENT ON FUNCTION rheap_flamegraph(int, text) IS 'a flame graph as SVG; metric: live, live_count, allocated, allocations, temporary or growth';
COMMENT ON FUNCTION rheap_html(int) IS 'one self-contained page: leaks, growth charts, flame graph, call sites, processes';
COMMENT ON FUNCTION rheap_pprof(int) IS 'gzipped profile.proto with alloc and inuse samples, for go tool pprof and the like';
COMMENT ON FUNCTION rheap_heaptrack(int) IS 'a data file of heaptrack, for heaptrack_print and heaptrack_gui';
COMMENT ON FUNCTION rheap_track(int, text) IS 'let one process record in a mode of its own while it runs: off, sampled, exact, or default';
"#,
    name = "reports_privileges_comments",
    requires = [
        rheap_report,
        rheap_report_json,
        rheap_folded,
        rheap_flamegraph,
        rheap_html,
        rheap_pprof,
        rheap_heaptrack,
        rheap_track
    ]
);
