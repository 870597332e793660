-- What DuckDB says in its own way; `dialect_postgres.sql` gives PostgreSQL the same names, and `views.sql` uses only them.

CREATE OR REPLACE MACRO kind_of(v) AS lower(json_type(v));  -- object, array, or that of a leaf

CREATE OR REPLACE MACRO as_json(words) AS try_cast(words AS JSON);

CREATE OR REPLACE MACRO short_number(x, digits) AS format('{:.' || digits || 'g}', x);

CREATE OR REPLACE MACRO brief_value(v) AS
    CASE json_type(v) WHEN 'DOUBLE' THEN short_number(v::DOUBLE, 4) WHEN 'VARCHAR' THEN v ->> '$' ELSE v::VARCHAR END;

-- An object as `density=0.2, scope=model`. What a macro says twice is planned twice, so steps are lists of their own.
CREATE OR REPLACE MACRO brief(settings) AS
    array_to_string(list_transform(
        list_filter(
            list_transform(json_keys(settings), lambda k: {key: k, value: json_extract(settings, '$."' || k || '"')}),
            lambda pair: json_type(pair.value) <> 'NULL'),
        lambda pair: pair.key || '=' || brief_value(pair.value)), ', ');

-- Refinements as `dare(drop=0.9) + pave`: of "dare:drop=0.9", ["dare", {"drop": 0.9}] or {"name": "dare", "settings": {...}}.
CREATE OR REPLACE MACRO brief_steps(steps) AS
    CASE WHEN json_type(steps) = 'ARRAY' AND json_array_length(steps) > 0 THEN array_to_string(list_transform(
        list_transform(steps::JSON[], lambda s: {
            name: coalesce(s ->> '$.name', s ->> '$[0]', s ->> '$'),
            settings: brief(coalesce(s -> '$.settings', s -> '$[1]'))}),
        lambda t: CASE WHEN t.settings <> '' THEN t.name || '(' || t.settings || ')' ELSE t.name END), ' + ') END;

-- Every run's config, one row per leaf.
CREATE VIEW config_leaves AS
SELECT r.run_id, ltrim(t.fullkey, '$.') AS key,
    CASE t.type WHEN 'VARCHAR' THEN t.value ->> '$' WHEN 'NULL' THEN NULL ELSE t.value::VARCHAR END AS value,
    try_cast(t.atom ->> '$' AS DOUBLE) AS number
FROM runs r CROSS JOIN json_tree(r.config) t
WHERE t.type NOT IN ('OBJECT', 'ARRAY') OR t.value::VARCHAR IN ('{}', '[]');

-- The settings that a run noted because its config does not have them, one row per setting.
CREATE VIEW chosen_leaves AS
SELECT e.run_id, t.key, t.value ->> '$' AS value
FROM environment e CROSS JOIN json_each(as_json(e.value)) t
WHERE e.key = 'settings' AND kind_of(as_json(e.value)) = 'object' AND kind_of(t.value) <> 'null';

-- A run's row with what hangs on it as JSON.
CREATE VIEW whole_runs AS
SELECT r.*,
    (SELECT to_json(list({role: role, task: task, ref: ref, digest: digest, run_id: parent_run}))
        FROM inputs i WHERE i.run_id = r.run_id) AS inputs,
    (SELECT to_json(list({kind: kind, path: path, digest: digest, bytes: bytes}))
        FROM artifacts a WHERE a.run_id = r.run_id) AS artifacts,
    (SELECT to_json(list({key: key, value: value})) FROM environment e WHERE e.run_id = r.run_id) AS environment
FROM runs r;

