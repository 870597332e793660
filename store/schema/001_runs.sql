-- Every command is a run from its first moment; what it used, measured and made hangs on its id.
-- A primary key on runs only: foreign keys and indexes would block later ALTER TABLEs. Times are UTC.

CREATE TABLE schema_version (
    version INTEGER,
    name VARCHAR,
    applied_at TIMESTAMP DEFAULT (now()::TIMESTAMP)
);

CREATE TABLE views_version (digest VARCHAR);

CREATE TABLE runs (
    run_id VARCHAR PRIMARY KEY,
    kind VARCHAR NOT NULL,          -- finetune, merge, eval, search, trial, run
    name VARCHAR,
    status VARCHAR NOT NULL,        -- started, finished, failed, cancelled; readers also see lost
    config JSON,
    config_digest VARCHAR,
    seed BIGINT,
    study VARCHAR,
    trial BIGINT,
    attempt INTEGER,                -- 1 for the first run of this config and seed
    command JSON,                   -- the words of the command line
    started_at TIMESTAMP,
    ended_at TIMESTAMP,
    seconds DOUBLE PRECISION,
    error VARCHAR
);

CREATE TABLE inputs (
    run_id VARCHAR,
    role VARCHAR,                   -- base, expert, model, head
    task VARCHAR,
    ref VARCHAR,                    -- as the user wrote it
    digest VARCHAR,
    parent_run VARCHAR
);

CREATE TABLE metrics (
    run_id VARCHAR,
    task VARCHAR,
    split VARCHAR,
    name VARCHAR,
    step BIGINT,
    value DOUBLE PRECISION          -- never NaN or infinite: NULL, and a word in environment
);

CREATE TABLE artifacts (
    run_id VARCHAR,
    kind VARCHAR,                   -- model, ...
    path VARCHAR,
    digest VARCHAR,
    bytes BIGINT
);

CREATE TABLE environment (
    run_id VARCHAR,
    key VARCHAR,
    value VARCHAR                   -- text, or JSON for anything else
);
