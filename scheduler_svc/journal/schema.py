"""The tables of a journal. Their comments are kept in the file: `sqlite3 FILE .schema` shows them."""

SCHEMA_VERSION = 1
APPLICATION_ID = 0x50414345  # "PACE": tells a journal from other people's databases

SCHEMA = (
    """\
CREATE TABLE meta (
    name TEXT PRIMARY KEY, -- schema: version of these tables; epoch: the highest that a scheduler has used
    value
)""",
    """\
CREATE TABLE requests (
    number INTEGER PRIMARY KEY, -- in order of acceptance
    id TEXT NOT NULL UNIQUE,
    content_hash BLOB NOT NULL, -- of the request as it was sent: a repeated submit must have the same
    accepted_at REAL NOT NULL, -- unix seconds, like every other time
    deadline_at REAL, -- NULL: none
    ended_at REAL, -- NULL: some of its choices have not ended
    prompt BLOB NOT NULL, -- token ids, little-endian uint32
    parameters TEXT NOT NULL -- JSON: all else that makes the request
)""",
    """\
CREATE TABLE choices (
    key INTEGER PRIMARY KEY, -- what `steps` calls this choice
    request INTEGER NOT NULL REFERENCES requests ON DELETE CASCADE,
    choice INTEGER NOT NULL, -- from 0
    output BLOB NOT NULL DEFAULT x'', -- token ids, little-endian uint32; while it has not ended, `steps` has the rest
    finish_reason TEXT, -- NULL: has not ended
    error TEXT NOT NULL DEFAULT '',
    executor_id TEXT, -- this and the next three: its last placement; NULL: none yet
    incarnation TEXT, -- hexadecimal, because SQLite has no uint64
    epoch INTEGER,
    attempt INTEGER,
    placement_count INTEGER NOT NULL DEFAULT 0 -- every placement after the first was a recomputation
)""",
    "CREATE INDEX choices_by_request ON choices (request)",
    """\
CREATE TABLE steps (
    number INTEGER PRIMARY KEY AUTOINCREMENT, -- in order of their results; deleted once `choices.output` has the tokens
    at REAL NOT NULL, -- unix seconds
    executor_id TEXT NOT NULL,
    step INTEGER NOT NULL, -- the executor's count
    keys TEXT NOT NULL, -- JSON array of choices.key
    token_ids TEXT NOT NULL -- JSON array: the token that each of these choices received
)""",
    """\
CREATE TABLE executors (
    executor_id TEXT PRIMARY KEY,
    joined BLOB NOT NULL -- its last paceline.v1.JoinRequest
)""",
    # Joining two json_each by position would compare every key with every token: quadratic in the rows of a step.
    """\
CREATE VIEW tokens AS -- who received which token when (UTC), as far as `steps` goes back
SELECT requests.id AS request,
    choices.choice AS choice,
    strftime('%Y-%m-%d %H:%M:%f', steps.at, 'unixepoch') AS at,
    json_extract(steps.token_ids, '$[' || entry.key || ']') AS token
FROM steps
JOIN json_each(steps.keys) AS entry
JOIN choices ON choices.key = entry.value
JOIN requests ON requests.number = choices.request
ORDER BY steps.number, entry.key""",
)
