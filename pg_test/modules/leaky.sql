-- The SQL functions of leaky.c.
CREATE FUNCTION leaky_leak(count int, size int) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_churn(count int, size int) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_grow(times int, step int) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_context(kind text, count int, size int, "end" text) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_move(count int, size int) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_query(size int) RETURNS int LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_sites(first int, count int, size int) RETURNS void LANGUAGE c STRICT AS 'leaky';
CREATE FUNCTION leaky_tree(count int) RETURNS void LANGUAGE c STRICT AS 'leaky';
