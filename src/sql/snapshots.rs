//! `rheap_snapshot` and `rheap_diff`.
//!
//! Snapshots are rows of tables that belong to the extension, not of shared memory: they are few and large, people
//! compare days, a restart lies in between, and what is in a table can be joined, copied and deleted by whoever takes
//! them. Names are stored, not addresses, so that a snapshot outlives the binary it was taken from. The price is that
//! a standby, which cannot write, takes none. The functions run as the owner of the extension, that pg_monitor may
//! take snapshots but not write into the tables; query ids are therefore not stored.

use pgrx::prelude::*;
use pgrx::{PgSqlErrorCode, extension_sql};

use super::text::Text;

/// Raises the error that says which snapshots there are. Called by `rheap_diff`.
#[pg_extern(volatile, parallel_unsafe)]
pub fn rheap_no_snapshot(id: Option<i64>) -> bool {
    const HINT: &str = "SELECT * FROM rheap_snapshots lists them; SELECT rheap_snapshot() takes one.";
    let id = super::given(id, "rheap_diff needs the id of a snapshot", HINT);
    super::refuse(PgSqlErrorCode::ERRCODE_INVALID_PARAMETER_VALUE, format!("there is no snapshot {id}"), HINT)
}

/// Raises the error that names the function, unless other processes can be looked at. Called by those that are written
/// in SQL, since what they call would name itself.
#[pg_extern(volatile, parallel_unsafe)]
pub fn rheap_require_cluster(function: Text) {
    super::require_cluster(&super::share(), &function.0);
}

extension_sql!(
    r#"
CREATE TABLE rheap_snapshots (
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    label text,
    taken_at timestamptz NOT NULL DEFAULT clock_timestamp()
);
CREATE TABLE rheap_snapshot_call_sites (
    snapshot bigint NOT NULL REFERENCES rheap_snapshots ON DELETE CASCADE,
    backend_type text NOT NULL,
    context text NOT NULL,
    function text NOT NULL,
    location text NOT NULL,
    stack text[] NOT NULL,
    live_bytes bigint NOT NULL,
    live_count bigint NOT NULL
);
CREATE INDEX ON rheap_snapshot_call_sites (snapshot);
CREATE TABLE rheap_snapshot_contexts (
    snapshot bigint NOT NULL REFERENCES rheap_snapshots ON DELETE CASCADE,
    backend_type text NOT NULL,
    path text NOT NULL,
    used_bytes bigint NOT NULL,
    contexts bigint NOT NULL
);
CREATE INDEX ON rheap_snapshot_contexts (snapshot);

CREATE FUNCTION rheap_snapshot(label text DEFAULT NULL) RETURNS bigint
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT @extschema@.rheap_require_cluster('rheap_snapshot');

    WITH snapshot AS (
        INSERT INTO @extschema@.rheap_snapshots (label) VALUES ($1) RETURNING id
    ), call_sites AS (
        INSERT INTO @extschema@.rheap_snapshot_call_sites
        SELECT id, backend_type, context, function, location, stack, sum(live_bytes), sum(live_count)
        FROM snapshot, @extschema@.rheap_call_sites()
        WHERE live_count > 0
        GROUP BY id, backend_type, context, function, location, stack
    ), contexts AS (
        INSERT INTO @extschema@.rheap_snapshot_contexts
        SELECT id, backend_type, path, sum(used_bytes), sum(contexts)
        FROM snapshot, @extschema@.rheap_contexts()
        GROUP BY id, backend_type, path
    )
    SELECT id FROM snapshot
$$;

CREATE FUNCTION rheap_diff("from" bigint, "to" bigint DEFAULT NULL) RETURNS TABLE (
    kind text, change text, backend_type text, context text, function text, location text,
    bytes_before bigint, bytes_after bigint, growth_bytes bigint,
    count_before bigint, count_after bigint, growth_count bigint, stack text[]
)
LANGUAGE sql VOLATILE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT @extschema@.rheap_no_snapshot(wanted.id)
    FROM (SELECT $1 UNION ALL SELECT $2 WHERE $2 IS NOT NULL) wanted (id)
    WHERE NOT EXISTS (SELECT FROM @extschema@.rheap_snapshots s WHERE s.id = wanted.id);

    SELECT @extschema@.rheap_require_cluster('rheap_diff') WHERE $2 IS NULL;

    WITH before AS (
        SELECT 'call site' AS kind, backend_type, context, function, location, stack, live_bytes AS bytes, live_count AS count
        FROM @extschema@.rheap_snapshot_call_sites WHERE snapshot = $1
        UNION ALL
        SELECT 'context', backend_type, path, NULL, NULL, NULL, used_bytes, contexts
        FROM @extschema@.rheap_snapshot_contexts WHERE snapshot = $1
    ), after AS (
        SELECT 'call site' AS kind, backend_type, context, function, location, stack, live_bytes AS bytes, live_count AS count
        FROM @extschema@.rheap_snapshot_call_sites WHERE snapshot = $2
        UNION ALL
        SELECT 'context', backend_type, path, NULL, NULL, NULL, used_bytes, contexts
        FROM @extschema@.rheap_snapshot_contexts WHERE snapshot = $2
        UNION ALL
        SELECT 'call site', backend_type, context, function, location, stack, live_bytes, live_count
        FROM (SELECT WHERE $2 IS NULL) now, @extschema@.rheap_call_sites() WHERE live_count > 0
        UNION ALL
        SELECT 'context', backend_type, path, NULL, NULL, NULL, used_bytes, contexts
        FROM (SELECT WHERE $2 IS NULL) now, @extschema@.rheap_contexts()
    ), both_moments AS (
        SELECT kind, backend_type, context, function, location, stack, bytes, count, 0 AS bytes_after, 0 AS count_after FROM before
        UNION ALL
        SELECT kind, backend_type, context, function, location, stack, 0, 0, bytes, count FROM after
    ), sums AS (
        SELECT kind, backend_type, context, function, location, stack, sum(bytes)::bigint AS b, sum(count)::bigint AS c,
               sum(bytes_after)::bigint AS ba, sum(count_after)::bigint AS ca
        FROM both_moments GROUP BY kind, backend_type, context, function, location, stack
    )
    SELECT kind, CASE WHEN b = 0 AND c = 0 THEN 'new' WHEN ba = 0 AND ca = 0 THEN 'gone' WHEN ba > b OR ba = b AND ca > c THEN 'grew' ELSE 'shrank' END,
           backend_type, context, function, location, b, ba, ba - b, c, ca, ca - c, stack
    FROM sums WHERE ba <> b OR ca <> c
    ORDER BY abs(ba - b) DESC, kind, context, function, location
$$;

REVOKE ALL ON rheap_snapshots, rheap_snapshot_call_sites, rheap_snapshot_contexts FROM PUBLIC;
REVOKE ALL ON FUNCTION rheap_snapshot(text), rheap_diff(bigint, bigint), rheap_no_snapshot(bigint), rheap_require_cluster(text) FROM PUBLIC;
GRANT SELECT ON rheap_snapshots, rheap_snapshot_call_sites, rheap_snapshot_contexts TO pg_monitor;
GRANT EXECUTE ON FUNCTION rheap_snapshot(text), rheap_diff(bigint, bigint) TO pg_monitor;

COMMENT ON TABLE rheap_snapshots IS 'moments that rheap_snapshot has noted; deleting one deletes what was noted';
COMMENT ON SEQUENCE rheap_snapshots_id_seq IS 'ids of snapshots';
COMMENT ON TABLE rheap_snapshot_call_sites IS 'what call sites held at each snapshot, all processes together';
COMMENT ON TABLE rheap_snapshot_contexts IS 'what the contexts of each path held at each snapshot, all processes together';
COMMENT ON FUNCTION rheap_snapshot(text) IS 'note what all processes hold now, for rheap_diff; returns the id of the snapshot';
COMMENT ON FUNCTION rheap_diff(bigint, bigint) IS 'what grew, shrank, is new or gone between two snapshots, or since one';
COMMENT ON FUNCTION rheap_no_snapshot(bigint) IS 'raises the error for a snapshot that does not exist; used by rheap_diff';
COMMENT ON FUNCTION rheap_require_cluster(text) IS 'raises the error that the named function needs shared_preload_libraries; used by rheap_snapshot and rheap_diff';
"#,
    name = "snapshots",
    requires = [rheap_no_snapshot, rheap_require_cluster, rheap_call_sites, rheap_contexts]
);
