package qcow2

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/fault"
)

type unixStat = syscall.Stat_t

// own gives an open file to a user; by descriptor, so that what is changed is
// what was opened.
func own(f *os.File, uid, gid int, mode fs.FileMode) error {
	// The mode first: while the old owner has it still, it must not be wider.
	if err := f.Chmod(mode); err != nil {
		return err
	}
	st, err := f.Stat()
	if err != nil {
		return err
	}
	if sys, ok := st.Sys().(*unixStat); ok && int(sys.Uid) == uid && int(sys.Gid) == gid {
		return nil
	}
	return f.Chown(uid, gid)
}

// ownDir lets the group of a machine's user pass through the directory, or
// nobody when the machine runs as the daemon's user.
func ownDir(d *os.Root, euid, gid, uid int) error {
	dir, err := d.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	mode := fs.FileMode(0o700)
	if uid != euid {
		mode = 0o710
	}
	return own(dir, euid, gid, mode)
}

// busy reports whether a QEMU has the file open: it marks what it does with an
// image by locks of its open file description on single bytes from 100 and 200
// on (QEMU's block/file-posix.c).
func busy(f *os.File) (bool, error) {
	l := unix.Flock_t{Type: unix.F_WRLCK, Whence: 0, Start: 100, Len: 200}
	if err := unix.FcntlFlock(f.Fd(), unix.F_OFD_GETLK, &l); err != nil {
		return false, fmt.Errorf("ask for locks: %w", err)
	}
	return l.Type != unix.F_UNLCK, nil
}

func entries(d *os.Root) ([]string, error) {
	dir, err := d.Open(".")
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.Readdirnames(-1)
}

func syncDir(d *os.Root) error {
	dir, err := d.Open(".")
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

func hostFault(verb string, err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT):
		return (&fault.Error{Kind: fault.NoSpace, Msg: fmt.Sprintf("cannot %s: the host's disk is full", verb), Err: err}).
			WithNext("Free some space in the data directory's file system, for example by destroying workspaces or removing images.")
	case errors.Is(err, fs.ErrPermission):
		return fault.New(fault.Missing, "cannot %s: %w", verb, err).
			WithNext("See that the data directory belongs to the daemon's user.")
	}
	if _, ok := errors.AsType[*fault.Error](err); ok {
		return err
	}
	return fmt.Errorf("%s: %w", verb, err)
}

func notFoundFault(verb, id string, err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "workspace %s has no disk", id).
			WithNext("Destroy the workspace and create it again.")
	}
	return hostFault(verb, err)
}

func exists(id string) error {
	return fault.New(fault.InUse, "a disk for %s exists already", id).
		WithNext("Remove it first.")
}
