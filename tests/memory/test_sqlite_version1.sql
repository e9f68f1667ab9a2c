-- The tables of version 1, as memfactory wrote them (memfactory/memory/sqlite_schema.py of that version), and a bank
-- of the time: three entries of anna, one changed, one deleted, with a fork; one entry of ben. Never change this file.
CREATE TABLE about (version INTEGER NOT NULL, store TEXT NOT NULL);
CREATE TABLE owners (id INTEGER PRIMARY KEY AUTOINCREMENT, owner TEXT NOT NULL UNIQUE);
CREATE TABLE banks (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    owner INTEGER NOT NULL REFERENCES owners (id),
    name TEXT NOT NULL,              -- empty for the owner's own bank, else the name of a fork
    head INTEGER NOT NULL DEFAULT 0, -- newest change; 0 before the first
    given INTEGER NOT NULL DEFAULT 0,-- how many ids were given out
    UNIQUE (owner, name)
);
CREATE TABLE changes (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- always larger than `parent` and `prior`
    owner INTEGER NOT NULL REFERENCES owners (id),
    parent INTEGER NOT NULL,              -- the change before this one; 0 for the first
    prior INTEGER,                        -- the change before this one of the same entry; NULL for ADD
    number INTEGER NOT NULL,              -- of the entry: 12 for e12
    verb TEXT NOT NULL,
    turn INTEGER,
    text TEXT,                            -- the entry afterwards; all NULL after DELETE
    key TEXT,
    tags TEXT,                            -- JSON list
    time TEXT
);
CREATE INDEX changes_of_owner ON changes (owner);
CREATE TABLE present (
    bank INTEGER NOT NULL REFERENCES banks (id),
    number INTEGER NOT NULL,
    change INTEGER NOT NULL REFERENCES changes (id),
    alive INTEGER NOT NULL,
    PRIMARY KEY (bank, number)
) WITHOUT ROWID;
CREATE VIEW searchable AS
    SELECT id, 'o' || owner AS scope, CAST(text AS TEXT) AS text, CAST(key AS TEXT) AS key
    FROM changes WHERE text IS NOT NULL;
CREATE VIRTUAL TABLE words USING fts5 (
    scope, text, key, content = 'searchable', content_rowid = 'id', tokenize = 'unicode61'
);
CREATE TRIGGER change_added AFTER INSERT ON changes WHEN new.text IS NOT NULL BEGIN
    INSERT INTO words (rowid, scope, text, key)
    VALUES (new.id, 'o' || new.owner, CAST(new.text AS TEXT), CAST(new.key AS TEXT));
END;
CREATE TRIGGER change_removed AFTER DELETE ON changes WHEN old.text IS NOT NULL BEGIN
    INSERT INTO words (words, rowid, scope, text, key)
    VALUES ('delete', old.id, 'o' || old.owner, CAST(old.text AS TEXT), CAST(old.key AS TEXT));
END;
INSERT INTO about VALUES (1, '00112233445566778899aabbccddeeff');
PRAGMA application_id = 1296450097;

INSERT INTO owners (owner) VALUES ('anna'), ('ben');
INSERT INTO changes (owner, parent, prior, number, verb, turn, text, key, tags, time) VALUES
    (1, 0, NULL, 1, 'ADD', 0, 'lives in Oslo', 'anna.city', '["home"]', '2024-01-01'),
    (1, 1, NULL, 2, 'ADD', 0, 'her physician told her to stop smoking', '', '[]', ''),
    (1, 2, NULL, 3, 'ADD', 1, 'likes figs', '', '[]', ''),
    (1, 3, 1, 1, 'UPDATE', 2, 'lives in Bergen', 'anna.city', '["home"]', '2024-01-01'),
    (2, 0, NULL, 1, 'ADD', 0, 'his doctor sells cigarettes', '', '[]', ''),
    (1, 4, 3, 3, 'DELETE', 3, NULL, NULL, NULL, NULL);
INSERT INTO banks (owner, name, head, given) VALUES (1, '', 6, 3), (2, '', 5, 1), (1, 'branch', 3, 3);
INSERT INTO present VALUES (1, 1, 4, 1), (1, 2, 2, 1), (1, 3, 6, 0), (2, 1, 5, 1), (3, 1, 1, 1), (3, 2, 2, 1), (3, 3, 3, 1);
