-- What people ask. Views are dropped and made anew whenever this file or a dialect's changes; nothing is stored in them.
-- The same text is run by DuckDB and by PostgreSQL: what they say differently has a name in dialect_*.sql.
--
-- A recipe is read from a run's config: `recipe.method`, `recipe.settings`, `recipe.refine`, or the same without
-- `recipe`. A note of that name (method, settings, refine) wins, and a note `given` (what the user set, as an object)
-- is shown in place of all settings.

-- Method, refinements and settings of every run that has a method.
CREATE VIEW recipes AS
WITH notes AS (
    SELECT run_id,
        max(value) FILTER (WHERE key = 'method') AS method,
        as_json(max(value) FILTER (WHERE key = 'settings')) AS settings,
        as_json(max(value) FILTER (WHERE key = 'refine')) AS refine,
        as_json(max(value) FILTER (WHERE key = 'given')) AS given
    FROM environment GROUP BY run_id
), told AS (
    SELECT r.run_id, r.kind,
        coalesce(n.method, (r.config -> 'recipe') ->> 'method', r.config ->> 'method') AS method,
        coalesce(n.settings, (r.config -> 'recipe') -> 'settings', r.config -> 'settings') AS settings,
        coalesce(n.refine, (r.config -> 'recipe') -> 'refine', r.config -> 'refine') AS refine,
        n.given
    FROM runs r LEFT JOIN notes n ON n.run_id = r.run_id
), chosen AS (
    SELECT run_id, method, settings, refine, coalesce(given, settings) AS given FROM told WHERE method IS NOT NULL
), worded AS (
    SELECT run_id, method, settings, brief_steps(refine) AS refine,
        CASE WHEN kind_of(given) = 'object' THEN brief(given) END AS shown
    FROM chosen
)
SELECT run_id, method, settings, refine, nullif(shown, '') AS shown FROM worded;

-- The newest score of every model on every task and split. A head is named where it is not the model's own.
CREATE VIEW scores AS
SELECT task, split, score, model_digest, head_digest, ref, eval_run, evaluated_at FROM (
SELECT m.task, m.split, m.value AS score, i.digest AS model_digest, nullif(h.digest, i.digest) AS head_digest,
    i.ref, r.run_id AS eval_run, r.ended_at AS evaluated_at,
    row_number() OVER (
        PARTITION BY m.task, m.split, i.digest, nullif(h.digest, i.digest)
        ORDER BY r.ended_at DESC NULLS LAST, r.run_id, m.step DESC NULLS FIRST) AS place
FROM metrics m
JOIN runs r ON r.run_id = m.run_id AND r.status = 'finished'
JOIN inputs i ON i.run_id = m.run_id AND i.role = 'model' AND i.digest IS NOT NULL
LEFT JOIN inputs h ON h.run_id = m.run_id AND h.role = 'head' AND h.task = m.task
WHERE m.name = 'score' AND m.value IS NOT NULL AND m.task IS NOT NULL AND m.split IS NOT NULL
) ranked WHERE place = 1;

-- Who a digest is: base, expert, merged (one row per recipe that gave these very weights), or just a model.
CREATE VIEW models AS
WITH ranked AS (
    SELECT a.digest, r.run_id, r.kind AS made_by,
        coalesce(r.name, nullif(regexp_replace(rtrim(a.path, '/'), '^.*/', ''), '')) AS name, p.method, p.refine,
        p.shown AS settings,
        row_number() OVER (
            PARTITION BY a.digest, r.kind = 'finetune', p.method, p.refine, p.shown
            ORDER BY r.ended_at DESC NULLS LAST, r.run_id) AS place
    FROM artifacts a
    JOIN runs r ON r.run_id = a.run_id AND r.status = 'finished' AND r.kind IN ('finetune', 'merge', 'search')
    LEFT JOIN recipes p ON p.run_id = a.run_id
    WHERE a.kind = 'model' AND a.digest IS NOT NULL
), made AS (
    SELECT digest, run_id, made_by, name, method, refine, settings FROM ranked WHERE place = 1
), tuned AS (
    SELECT * FROM made WHERE made_by = 'finetune'
), bases AS (
    SELECT DISTINCT digest FROM inputs WHERE role = 'base' AND digest IS NOT NULL
), experts AS (
    SELECT digest FROM inputs WHERE role = 'expert' AND digest IS NOT NULL
    UNION SELECT tuned.digest FROM tuned JOIN inputs i ON i.run_id = tuned.run_id AND i.role = 'base'
), known AS (
    SELECT digest, 'merged' AS kind, run_id, made_by, name, method, refine, settings FROM made WHERE made_by <> 'finetune'
    UNION ALL
    SELECT b.digest, 'base', t.run_id, t.made_by, t.name, NULL, NULL, NULL
    FROM bases b LEFT JOIN tuned t ON t.digest = b.digest
    UNION ALL
    SELECT e.digest, 'expert', t.run_id, t.made_by, t.name, NULL, NULL, NULL
    FROM experts e LEFT JOIN tuned t ON t.digest = e.digest
    WHERE t.digest IS NOT NULL OR e.digest NOT IN (SELECT digest FROM made)
)
SELECT * FROM known
UNION ALL
SELECT DISTINCT s.model_digest, 'model', t.run_id, t.made_by, t.name, NULL, NULL, NULL
FROM scores s LEFT JOIN tuned t ON t.digest = s.model_digest
WHERE s.model_digest NOT IN (SELECT digest FROM known);

-- One row per model, task and split: the score, its share of the expert's, and where it lies between base (0) and
-- expert (1). Both are empty where base or expert have no score there, or the expert is no better than nothing or
-- than the base.
CREATE VIEW leaderboard AS
WITH origins AS (  -- the base an expert came from: by its training, or by a merge that used both
    SELECT digest, base_digest FROM (
        SELECT digest, base_digest, row_number() OVER (
            PARTITION BY digest ORDER BY rank, ended_at DESC NULLS LAST, base_digest) AS place
        FROM (
            SELECT a.digest, b.digest AS base_digest, 1 AS rank, r.ended_at
            FROM artifacts a JOIN runs r ON r.run_id = a.run_id AND r.kind = 'finetune'
            JOIN inputs b ON b.run_id = a.run_id AND b.role = 'base' WHERE a.kind = 'model'
            UNION ALL
            SELECT e.digest, b.digest, 2, r.ended_at
            FROM inputs e JOIN inputs b ON b.run_id = e.run_id AND b.role = 'base' JOIN runs r ON r.run_id = e.run_id
            WHERE e.role = 'expert') found
        WHERE digest IS NOT NULL AND base_digest IS NOT NULL) ranked
    WHERE place = 1
), used AS (  -- the expert a merge used for a task
    SELECT run_id, task, min(digest) AS digest FROM inputs WHERE role = 'expert' GROUP BY run_id, task
), based AS (
    SELECT run_id, min(digest) AS digest FROM inputs WHERE role = 'base' GROUP BY run_id
), usual AS (  -- the expert that the newest merge on a base used for a task
    SELECT base_digest, task, digest FROM (
        SELECT coalesce(b.digest, o.base_digest) AS base_digest, u.task, u.digest, row_number() OVER (
            PARTITION BY coalesce(b.digest, o.base_digest), u.task ORDER BY r.ended_at DESC NULLS LAST, u.run_id) AS place
        FROM used u JOIN runs r ON r.run_id = u.run_id AND r.status = 'finished'
        LEFT JOIN based b ON b.run_id = u.run_id LEFT JOIN origins o ON o.digest = u.digest) ranked
    WHERE place = 1
), own AS (  -- the tasks an expert was used for
    SELECT DISTINCT digest, task FROM inputs WHERE role = 'expert' AND task IS NOT NULL AND digest IS NOT NULL
), placed AS (
    SELECT s.*, m.kind, m.run_id, m.made_by, m.name, m.method, m.refine, m.settings,
        CASE m.kind WHEN 'base' THEN s.model_digest
            WHEN 'merged' THEN coalesce(b.digest, ou.base_digest) ELSE o.base_digest END AS base_digest,
        CASE WHEN m.kind = 'merged' THEN u.digest ELSE coalesce(s.head_digest,
            CASE WHEN m.kind = 'expert' AND (s.model_digest NOT IN (SELECT digest FROM own)
                OR EXISTS (SELECT 1 FROM own w WHERE w.digest = s.model_digest AND w.task = s.task))
                THEN s.model_digest END) END AS near
    FROM scores s JOIN models m ON m.digest = s.model_digest
    LEFT JOIN used u ON u.run_id = m.run_id AND u.task = s.task
    LEFT JOIN based b ON b.run_id = m.run_id
    LEFT JOIN origins o ON o.digest = s.model_digest
    LEFT JOIN origins ou ON ou.digest = u.digest
), judged AS (
    SELECT p.*, coalesce(p.near, CASE WHEN p.kind <> 'merged' THEN f.digest END) AS expert_digest
    FROM placed p LEFT JOIN usual f ON f.base_digest = p.base_digest AND f.task = p.task
)
SELECT j.split, split_part(j.task, '/', 1) AS suite, j.task, j.kind,
    coalesce(j.name, nullif(regexp_replace(rtrim(j.ref, '/'), '^.*/', ''), ''), left(j.model_digest, 12)) AS model,
    j.method, j.refine, j.settings, j.score,
    CASE WHEN e.score > 0 THEN j.score / e.score END AS relative_to_expert,
    CASE WHEN e.score > coalesce(bh.score, bo.score)
        THEN (j.score - coalesce(bh.score, bo.score)) / (e.score - coalesce(bh.score, bo.score)) END AS normalised,
    e.score AS expert_score, coalesce(bh.score, bo.score) AS base_score,
    j.model_digest, j.expert_digest, j.base_digest, j.run_id, j.made_by, j.eval_run, j.evaluated_at
FROM judged j
LEFT JOIN scores e ON e.model_digest = j.expert_digest AND e.task = j.task AND e.split = j.split
    AND e.head_digest IS NULL
LEFT JOIN scores bh ON bh.model_digest = j.base_digest AND bh.task = j.task AND bh.split = j.split
    AND bh.head_digest = j.expert_digest
LEFT JOIN scores bo ON bo.model_digest = j.base_digest AND bo.task = j.task AND bo.split = j.split
    AND bo.head_digest IS NULL;

-- Every run's config unfolded, one row per leaf: `recipe.settings.density`, `0.2`.
CREATE VIEW settings AS
SELECT r.run_id, r.kind, r.name, r.status, p.method, c.key, c.value, c.number
FROM config_leaves c JOIN runs r ON r.run_id = c.run_id LEFT JOIN recipes p ON p.run_id = c.run_id;

-- Every trial of every study; its value is the metric `objective`, or the mean of its scores.
CREATE VIEW trials AS
WITH valued AS (
    SELECT run_id, coalesce(max(value) FILTER (WHERE name = 'objective'), avg(value) FILTER (WHERE name = 'score')) AS value
    FROM metrics GROUP BY run_id
)
SELECT r.study, r.trial, r.run_id, r.status, p.method, p.shown AS settings, v.value,
    max(v.value) OVER (PARTITION BY r.study ORDER BY r.trial, r.started_at ROWS UNBOUNDED PRECEDING) AS best_so_far,
    r.seconds, r.started_at, r.error
FROM runs r LEFT JOIN valued v ON v.run_id = r.run_id LEFT JOIN recipes p ON p.run_id = r.run_id
WHERE r.kind = 'trial';

-- What a run was made from, and that from, and so on: `parent` is the run that made the input, if one here did.
CREATE VIEW lineage AS
WITH RECURSIVE edges AS (
    SELECT run_id, role, task, ref, digest, parent FROM (
        SELECT i.run_id, i.role, i.task, i.ref, i.digest, coalesce(i.parent_run, p.run_id) AS parent, row_number() OVER (
            PARTITION BY i.run_id, i.role, i.task, i.ref, i.digest
            ORDER BY p.started_at DESC NULLS LAST, p.run_id) AS place
        FROM inputs i JOIN runs r ON r.run_id = i.run_id
        LEFT JOIN (
            SELECT a.digest, p.run_id, p.started_at FROM artifacts a JOIN runs p ON p.run_id = a.run_id
            WHERE a.digest IS NOT NULL AND NOT EXISTS (  -- a run that changed nothing made nothing
                SELECT 1 FROM inputs n WHERE n.run_id = a.run_id AND n.digest = a.digest)
        ) p ON p.digest = i.digest AND p.started_at < r.started_at AND i.parent_run IS NULL) ranked
    WHERE place = 1
), walk AS (
    SELECT run_id, 1 AS depth, run_id AS child, role, task, ref, digest, parent FROM edges
    UNION
    SELECT w.run_id, w.depth + 1, e.run_id, e.role, e.task, e.ref, e.digest, e.parent
    FROM walk w JOIN edges e ON e.run_id = w.parent WHERE w.depth < 50 AND e.run_id <> w.run_id
)
SELECT w.*, r.kind AS parent_kind, r.name AS parent_name FROM walk w LEFT JOIN runs r ON r.run_id = w.parent;

-- What a run took: time, and where it measured them examples, FLOPs and memory; and the bytes it left.
CREATE VIEW cost AS
WITH measured AS (
    SELECT run_id,
        max(value) FILTER (WHERE name = 'flops') AS flops,
        max(value) FILTER (WHERE name = 'peak_memory') AS peak_memory,
        sum(value) FILTER (WHERE name = 'examples') AS examples
    FROM metrics GROUP BY run_id
), kept AS (
    SELECT run_id, sum(bytes)::BIGINT AS bytes FROM artifacts GROUP BY run_id
)
SELECT r.run_id, r.kind, r.name, p.method, r.status, r.started_at, r.seconds, m.examples, m.flops, m.peak_memory,
    k.bytes
FROM runs r LEFT JOIN measured m ON m.run_id = r.run_id LEFT JOIN kept k ON k.run_id = r.run_id
LEFT JOIN recipes p ON p.run_id = r.run_id;

-- The best model of each method on each task and split.
CREATE VIEW best AS
SELECT suite, task, split, method, refine, settings, score, relative_to_expert, normalised, model, run_id, model_digest
FROM (
    SELECT l.*, row_number() OVER (PARTITION BY task, split, method ORDER BY score DESC, evaluated_at, run_id) AS place
    FROM leaderboard l WHERE kind = 'merged') ranked
WHERE place = 1;

-- Every fact of every run in one shape, so that runs can be put side by side.
CREATE VIEW compare AS
WITH facts AS (
    SELECT r.run_id, 1 AS place, 'run' AS section, f.key, f.value
    FROM runs r CROSS JOIN LATERAL (VALUES
        ('kind', r.kind), ('name', r.name), ('status', r.status), ('seed', r.seed::VARCHAR),
        ('attempt', r.attempt::VARCHAR), ('seconds', short_number(r.seconds, 3)), ('error', r.error)) f(key, value)
    UNION ALL
    SELECT run_id, 2, 'setting', key, value FROM settings
    UNION ALL
    SELECT run_id, 3, 'chosen', key, value FROM chosen_leaves  -- by a search, whose config says only what it might choose
    UNION ALL
    SELECT run_id, 4, 'input', concat_ws(' ', role, task), ref FROM inputs
    UNION ALL
    SELECT run_id, 5, 'metric', concat_ws(' ', name, task, split), short_number(value, 6) FROM (
        SELECT m.*, row_number() OVER (PARTITION BY run_id, name, task, split ORDER BY coalesce(step, 0) DESC) AS place
        FROM metrics m WHERE value IS NOT NULL) last_values
    WHERE place = 1
    UNION ALL
    SELECT run_id, 6, 'result', concat_ws(' ', 'score', task, split), short_number(min(score), 6)
    FROM leaderboard WHERE run_id IS NOT NULL GROUP BY run_id, task, split
)
SELECT run_id, section, key, value, place FROM facts WHERE value IS NOT NULL;
