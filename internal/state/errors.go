package state

import (
	"context"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
	"modernc.org/sqlite"
	sqlite3 "modernc.org/sqlite/lib"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

// wrap turns SQLite's result codes into what a user can act on; faults pass.
func (db *DB) wrap(ctx context.Context, verb string, err error) error {
	if err == nil || errors.Is(err, domain.ErrIDTaken) {
		return err
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	// SQLite says "interrupted", which hides who did it.
	if cerr := ctx.Err(); cerr != nil {
		return fmt.Errorf("%s: %w", verb, cerr)
	}
	se, ok := errors.AsType[*sqlite.Error](err)
	if !ok {
		return fmt.Errorf("%s: %w", verb, err)
	}
	switch se.Code() & 0xff { // the primary code; the rest says where
	case sqlite3.SQLITE_FULL:
		return db.noSpace(err)
	case sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB:
		return db.corrupt(err)
	case sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED:
		return fault.New(fault.Unavailable, "%s: another process holds %s locked: %w", verb, db.opt.Path, err).
			WithNext("Close the program that has it open (such as sqlite3) and try again.")
	case sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM:
		return openFault(db.opt.Path, err)
	case sqlite3.SQLITE_IOERR:
		// Growing the shared memory file and fsync report a full disk as an
		// I/O error.
		if full(db.opt.Path) {
			return db.noSpace(err)
		}
	}
	return fmt.Errorf("%s: %w", verb, err)
}

func (db *DB) noSpace(err error) error {
	return (&fault.Error{Kind: fault.NoSpace, Msg: fmt.Sprintf("cannot write %s: the disk is full", db.opt.Path), Err: err}).
		WithNext("Free some space on that file system and try again; the records are as they were.")
}

func (db *DB) corrupt(err error) error {
	next := "Keep a copy of the data directory before anything else: without its records every disk in it counts as nobody's."
	if _, serr := os.Stat(db.opt.Path + ".bak"); serr == nil {
		next += fmt.Sprintf(" Then put %s.bak, the copy made at the last good start, in its place.", db.opt.Path)
	}
	return fault.New(fault.Internal, "the state file %s is damaged: %w", db.opt.Path, err).WithNext("%s", next)
}

func openFault(path string, err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return (&fault.Error{Kind: fault.NoSpace, Msg: fmt.Sprintf("cannot create %s: the disk is full", path), Err: err}).
			WithNext("Free some space on that file system and try again.")
	}
	return fault.New(fault.Missing, "cannot open the state file %s: %w", path, err).
		WithNext("See that its directory exists and that the file and the directory are writable for the daemon's user.")
}

// full reports whether less than one database page is left for path.
func full(path string) bool {
	var st unix.Statfs_t
	return unix.Statfs(path, &st) == nil && st.Bavail*uint64(st.Bsize) < 32<<10
}
