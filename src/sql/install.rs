//! What the install script has beside the functions: views, privileges, comments, and a check of the version.

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, extension_sql};

/// Called by the install script with its own version.
#[pg_extern(volatile, parallel_unsafe)]
fn rheap_require_version(version: &str) {
    let library = env!("CARGO_PKG_VERSION");
    if version != library {
        super::refuse(
            PgSqlErrorCode::ERRCODE_OBJECT_NOT_IN_PREREQUISITE_STATE,
            format!("the loaded library is rheap {library}, the extension script is of version {version}"),
            &format!(
                "Restart the server to load the installed library, or write CREATE EXTENSION rheap VERSION '{library}'."
            ),
        );
    }
}

extension_sql!(
    r#"
SELECT @extschema@.rheap_require_version('0.1.0');

CREATE TABLE rheap_suppressions (
    pattern text PRIMARY KEY,
    reason text NOT NULL,
    created_by name NOT NULL DEFAULT current_user,
    created timestamptz NOT NULL DEFAULT now()
);
SELECT pg_catalog.pg_extension_config_dump('rheap_suppressions', '');

CREATE VIEW rheap_leaks AS SELECT * FROM rheap_leaks();
CREATE VIEW rheap_call_sites AS SELECT * FROM rheap_call_sites();
CREATE VIEW rheap_contexts AS SELECT * FROM rheap_contexts();
CREATE VIEW rheap_processes AS SELECT * FROM rheap_processes();
CREATE VIEW rheap_ended AS SELECT * FROM rheap_ended();

REVOKE ALL ON FUNCTION rheap_leaks(int), rheap_call_sites(int), rheap_contexts(int), rheap_processes(int), rheap_ended(), rheap_report_json(int), rheap_reset(int), rheap_check(text, int, int), rheap_assert_no_leaks(text, int, int), rheap_suppress(text, text), rheap_unsuppress(text), rheap_require_version(text) FROM PUBLIC;
REVOKE ALL ON rheap_suppressions, rheap_leaks, rheap_call_sites, rheap_contexts, rheap_processes, rheap_ended FROM PUBLIC;
GRANT EXECUTE ON FUNCTION rheap_leaks(int), rheap_call_sites(int), rheap_contexts(int), rheap_processes(int), rheap_ended(), rheap_report_json(int), rheap_check(text, int, int), rheap_assert_no_leaks(text, int, int) TO pg_monitor;
GRANT SELECT ON rheap_suppressions, rheap_leaks, rheap_call_sites, rheap_contexts, rheap_processes, rheap_ended TO pg_monitor;

COMMENT ON FUNCTION rheap_leaks(int) IS 'memory leaks of all live processes, or of one: a row per call site that keeps growing, worst first';
COMMENT ON FUNCTION rheap_call_sites(int) IS 'every call site in watched memory contexts, with verdict and counts';
COMMENT ON FUNCTION rheap_contexts(int) IS 'memory contexts per process and path, and how they have grown';
COMMENT ON FUNCTION rheap_processes(int) IS 'what rheap knows of each process, and what it costs there';
COMMENT ON FUNCTION rheap_ended() IS 'what processes held when they ended or were killed, newest first: a row per call site';
COMMENT ON FUNCTION rheap_report_json(int) IS 'the leaks, call sites, contexts and processes as one JSON document';
COMMENT ON FUNCTION rheap_reset(int) IS 'forget the history of one process or of all: the baseline is now';
COMMENT ON FUNCTION rheap_check(text, int, int) IS 'run a statement many times in this session: a row per call site that keeps memory of each call';
COMMENT ON FUNCTION rheap_assert_no_leaks(text, int, int) IS 'raises an error that lists the rows of rheap_check, if there are any';
COMMENT ON FUNCTION rheap_suppress(text, text) IS 'say that call sites with a function or memory context like this are no leaks, and why; * stands for any text';
COMMENT ON FUNCTION rheap_unsuppress(text) IS 'take back a suppression; false if there is none with this pattern';
COMMENT ON TABLE rheap_suppressions IS 'what rheap_suppress has said; dumped with the database';
COMMENT ON FUNCTION rheap_require_version(text) IS 'raises an error unless the loaded library has this version; used by the install script';
COMMENT ON VIEW rheap_leaks IS 'memory leaks of all live processes, worst first';
COMMENT ON VIEW rheap_call_sites IS 'every call site in watched memory contexts of all live processes';
COMMENT ON VIEW rheap_contexts IS 'memory contexts of all live processes by path';
COMMENT ON VIEW rheap_processes IS 'what rheap knows of each live process';
COMMENT ON VIEW rheap_ended IS 'what processes held when they ended or were killed, newest first';
"#,
    name = "views_privileges_comments",
    finalize
);
