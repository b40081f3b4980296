CREATE TABLE workspaces (
    id     TEXT PRIMARY KEY,
    record TEXT NOT NULL CHECK (json_valid(record)),
    name   TEXT NOT NULL GENERATED ALWAYS AS (record ->> '$.Name') STORED,
    state  TEXT NOT NULL GENERATED ALWAYS AS (record ->> '$.State') STORED,
    image  TEXT NOT NULL GENERATED ALWAYS AS (record ->> '$.ImageDigest') STORED,
    uid    INTEGER NOT NULL GENERATED ALWAYS AS (record ->> '$.UID') STORED,
    cid    INTEGER NOT NULL GENERATED ALWAYS AS (record ->> '$.CID') STORED,
    CHECK (id = record ->> '$.ID')
) STRICT, WITHOUT ROWID;

CREATE UNIQUE INDEX workspaces_name ON workspaces (name);
CREATE UNIQUE INDEX workspaces_uid ON workspaces (uid) WHERE uid > 0;
CREATE UNIQUE INDEX workspaces_cid ON workspaces (cid) WHERE cid > 0;
CREATE INDEX workspaces_state ON workspaces (state);
