-- The SQL functions of the corpus; corpus_bump is there from 17 on.
CREATE FUNCTION corpus_small() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_rare() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_large() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_variable() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_cache() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_child() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_contexts() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_reparented() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_hash() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_array() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_list() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_generation() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_slab() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_nine() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_shared() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_recursion() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_error(int) RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_parallel(int) RETURNS bigint LANGUAGE c PARALLEL SAFE AS 'corpus_processes';
CREATE FUNCTION corpus_saturates() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_lru() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_sawtooth() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_arena() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_once() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_ring() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_behind() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_buffer() RETURNS bigint LANGUAGE c AS 'corpus_benign';
CREATE FUNCTION corpus_late() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_arrays() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_numbers() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_ways() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_hollow() RETURNS bigint LANGUAGE c AS 'corpus';
CREATE FUNCTION corpus_round() RETURNS bigint LANGUAGE c AS 'corpus_benign';
DO $$ BEGIN
  IF current_setting('server_version_num')::int >= 170000 THEN
    CREATE FUNCTION corpus_bump() RETURNS bigint LANGUAGE c AS 'corpus';
  END IF;
END $$;
