-- What PostgreSQL says in its own way; see `dialect_duckdb.sql`.

CREATE OR REPLACE FUNCTION kind_of(v json) RETURNS text LANGUAGE sql IMMUTABLE AS $$ SELECT json_typeof(v) $$;

CREATE OR REPLACE FUNCTION as_json(words text) RETURNS json LANGUAGE plpgsql IMMUTABLE AS $$
BEGIN
    RETURN words::json;
EXCEPTION WHEN invalid_text_representation THEN
    RETURN NULL;
END $$;

-- C's %g: so many digits, no zeros behind, an exponent where the number is very large or small.
CREATE OR REPLACE FUNCTION short_number(x double precision, digits integer) RETURNS text LANGUAGE plpgsql IMMUTABLE AS $$
DECLARE
    told text := to_char(x::numeric, '9.' || repeat('9', digits - 1) || 'EEEE');
    power integer := split_part(told, 'e', 2)::integer;
BEGIN
    IF x = 0 THEN
        RETURN '0';
    ELSIF power < -4 OR power >= digits THEN
        RETURN trim_scale(split_part(told, 'e', 1)::numeric)::text || 'e' || CASE WHEN power < 0 THEN '-' ELSE '+' END
            || lpad(abs(power)::text, greatest(2, length(abs(power)::text)), '0');
    END IF;
    RETURN trim_scale(round(x::numeric, digits - 1 - power))::text;
END $$;

CREATE OR REPLACE FUNCTION brief_value(v json) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN json_typeof(v) = 'number' AND v::text ~ '[.eE]' THEN short_number(v::text::double precision, 4)
        WHEN json_typeof(v) = 'string' THEN v #>> '{}'
        ELSE v::text END
$$;

CREATE OR REPLACE FUNCTION brief(settings json) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT string_agg(t.key || '=' || brief_value(t.value), ', ' ORDER BY t.place)
    FROM json_each(CASE WHEN json_typeof(settings) = 'object' THEN settings ELSE '{}' END)
        WITH ORDINALITY AS t(key, value, place)
    WHERE json_typeof(t.value) <> 'null'
$$;

CREATE OR REPLACE FUNCTION brief_steps(steps json) RETURNS text LANGUAGE sql IMMUTABLE AS $$
    SELECT string_agg(coalesce(s.step ->> 'name', s.step ->> 0, s.step #>> '{}')
        || coalesce('(' || nullif(brief(coalesce(s.step -> 'settings', s.step -> 1)), '') || ')', ''), ' + ' ORDER BY s.place)
    FROM json_array_elements(CASE WHEN json_typeof(steps) = 'array' THEN steps ELSE '[]' END)
        WITH ORDINALITY AS s(step, place)
$$;

CREATE OR REPLACE FUNCTION parts_of(document json) RETURNS TABLE (key text, value json) LANGUAGE sql IMMUTABLE AS $$
    SELECT '.' || CASE WHEN o.key ~ '^[A-Za-z0-9_]+$' THEN o.key ELSE '"' || o.key || '"' END, o.value
    FROM json_each(CASE WHEN json_typeof(document) = 'object' THEN document ELSE '{}' END) o
    UNION ALL
    SELECT '[' || (a.place - 1) || ']', a.value
    FROM json_array_elements(CASE WHEN json_typeof(document) = 'array' THEN document ELSE '[]' END)
        WITH ORDINALITY AS a(value, place)
$$;

CREATE VIEW config_leaves AS
WITH RECURSIVE walk AS (
    SELECT r.run_id, '' AS key, r.config AS value FROM runs r WHERE r.config IS NOT NULL
    UNION ALL
    SELECT w.run_id, w.key || p.key, p.value FROM walk w CROSS JOIN LATERAL parts_of(w.value) p
)
SELECT run_id, ltrim(key, '.') AS key, CASE WHEN json_typeof(value) <> 'null' THEN value #>> '{}' END AS value,
    CASE WHEN json_typeof(value) IN ('number', 'string') AND value #>> '{}' ~ '^[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?$'
        THEN (value #>> '{}')::double precision END AS number
FROM walk WHERE json_typeof(value) NOT IN ('object', 'array') OR value::text IN ('{}', '[]');

CREATE VIEW chosen_leaves AS
SELECT e.run_id, t.key, t.value #>> '{}' AS value
FROM environment e CROSS JOIN LATERAL json_each(
    CASE WHEN json_typeof(as_json(e.value)) = 'object' THEN as_json(e.value) ELSE '{}' END) t
WHERE e.key = 'settings' AND json_typeof(t.value) <> 'null';

CREATE VIEW whole_runs AS
SELECT r.*,
    (SELECT json_agg(json_build_object('role', role, 'task', task, 'ref', ref, 'digest', digest, 'run_id', parent_run))
        FROM inputs i WHERE i.run_id = r.run_id) AS inputs,
    (SELECT json_agg(json_build_object('kind', kind, 'path', path, 'digest', digest, 'bytes', bytes))
        FROM artifacts a WHERE a.run_id = r.run_id) AS artifacts,
    (SELECT json_agg(json_build_object('key', key, 'value', value)) FROM environment e WHERE e.run_id = r.run_id)
        AS environment
FROM runs r;
