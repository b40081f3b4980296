package files

import (
	"context"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// dirMode is what a new directory gets: what mkdir gives under the usual umask.
const dirMode = 0o755

// as is the user whom package guest found for a Connect call.
func as(ctx context.Context) (users.User, error) {
	u, ok := users.FromContext(ctx)
	if !ok {
		return users.User{}, unauthorizedf("the call has no user")
	}
	return u, nil
}

// on resolves p for the call's user and runs fn as that user.
func (s *Service) on(ctx context.Context, p string, fn func(u users.User, p string) error) error {
	u, err := as(ctx)
	if err != nil {
		return asConnect(err)
	}
	if p, err = resolve(u, p); err != nil {
		return asConnect(err)
	}
	return asConnect(u.Do(func() error { return fn(u, p) }))
}

// Stat describes a file; see entryAt for symbolic links.
func (s *Service) Stat(ctx context.Context, req *connect.Request[filesystem.StatRequest]) (*connect.Response[filesystem.StatResponse], error) {
	var e *filesystem.EntryInfo
	err := s.on(ctx, req.Msg.GetPath(), func(_ users.User, p string) (err error) {
		e, err = entryAt(p, s.opt.Accounts.Names())
		if absent(err) {
			return absentf("path '%s' does not exist", valid(p))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.StatResponse{Entry: e}), nil
}

// MakeDir makes a directory and its parents. A directory that is there already
// is already_exists; anything else in its place invalid_argument.
func (s *Service) MakeDir(ctx context.Context, req *connect.Request[filesystem.MakeDirRequest]) (*connect.Response[filesystem.MakeDirResponse], error) {
	var e *filesystem.EntryInfo
	err := s.on(ctx, req.Msg.GetPath(), func(_ users.User, p string) error {
		if err := os.MkdirAll(path.Dir(p), dirMode); err != nil {
			return err
		}
		if err := os.Mkdir(p, dirMode); errors.Is(err, fs.ErrExist) {
			if fi, err := os.Stat(p); err == nil && fi.IsDir() {
				return problemf(connect.CodeAlreadyExists, http.StatusConflict, "directory '%s' already exists", valid(p))
			}
			return invalidf("path '%s' already exists but is not a directory", valid(p))
		} else if err != nil {
			return err
		}
		var err error
		e, err = entryAt(p, s.opt.Accounts.Names())
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.MakeDirResponse{Entry: e}), nil
}

// Move renames, also from one file system to another. Parents of the
// destination are made; a file there is replaced. A symbolic link is moved, not
// what it leads to.
func (s *Service) Move(ctx context.Context, req *connect.Request[filesystem.MoveRequest]) (*connect.Response[filesystem.MoveResponse], error) {
	var e *filesystem.EntryInfo
	err := s.on(ctx, req.Msg.GetSource(), func(u users.User, src string) error {
		dst, err := resolve(u, req.Msg.GetDestination())
		if err != nil {
			return err
		}
		if _, err := os.Lstat(src); absent(err) {
			return absentf("path '%s' does not exist", valid(src))
		} else if err != nil {
			return err
		}
		if src != dst && under(dst, src) {
			return invalidf("cannot move '%s' into itself", valid(src))
		}
		if err := os.MkdirAll(path.Dir(dst), dirMode); err != nil {
			return err
		}
		err = os.Rename(src, dst)
		if errors.Is(err, unix.EXDEV) {
			err = moveAcross(ctx, src, dst)
		}
		if err != nil {
			return err
		}
		e, err = entryAt(dst, s.opt.Accounts.Names())
		return err
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.MoveResponse{Entry: e}), nil
}

// Remove deletes a file, or a directory with all that is in it. Removing what
// is not there succeeds, as clients expect.
func (s *Service) Remove(ctx context.Context, req *connect.Request[filesystem.RemoveRequest]) (*connect.Response[filesystem.RemoveResponse], error) {
	err := s.on(ctx, req.Msg.GetPath(), func(_ users.User, p string) error {
		if p == "/" {
			return invalidf("the root directory cannot be removed")
		}
		if err := os.RemoveAll(p); !absent(err) {
			return err
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.RemoveResponse{}), nil
}

// Bounds of one listing. An entry is about 200 bytes on the wire.
const (
	maxListEntries = 50_000
	maxListDepth   = 2048 // PATH_MAX has no room for more
)

// ListDir lists a directory to a depth in lexical order, each directory before
// its contents. If the path itself is a symbolic link it is followed; others
// are not. What cannot be read below is listed without its contents. More than
// maxListEntries is an error rather than a part that looks like the whole.
func (s *Service) ListDir(ctx context.Context, req *connect.Request[filesystem.ListDirRequest]) (*connect.Response[filesystem.ListDirResponse], error) {
	l := lister{ctx: ctx}
	err := s.on(ctx, req.Msg.GetPath(), func(_ users.User, p string) error {
		if err := mustBeDir(p); err != nil {
			return err
		}
		l.names = s.opt.Accounts.Names()
		return l.list(p, min(max(1, int(req.Msg.GetDepth())), maxListDepth))
	})
	if err != nil {
		return nil, err
	}
	return connect.NewResponse(&filesystem.ListDirResponse{Entries: l.entries}), nil
}

// mustBeDir checks that p is a directory or leads to one.
func mustBeDir(p string) error {
	fi, err := os.Stat(p)
	switch {
	case errors.Is(err, unix.ELOOP):
		return problemf(connect.CodeFailedPrecondition, http.StatusBadRequest, "path '%s' is a cyclic symlink", valid(p))
	case absent(err):
		return absentf("path '%s' does not exist", valid(p))
	case err != nil:
		return err
	case !fi.IsDir():
		return invalidf("path '%s' is not a directory", valid(p))
	}
	return nil
}

type lister struct {
	ctx     context.Context
	names   *users.Names
	entries []*filesystem.EntryInfo
}

func (l *lister) list(dir string, depth int) error {
	names, err := readNames(dir, maxListEntries-len(l.entries))
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := l.ctx.Err(); err != nil {
			return err
		}
		p := filepath.Join(dir, name)
		fi, err := os.Lstat(p)
		if err != nil {
			continue // gone since
		}
		if len(l.entries) == maxListEntries {
			return tooMany(maxListEntries)
		}
		l.entries = append(l.entries, entryOf(p, fi, l.names))
		if fi.IsDir() && depth > 1 {
			if err := l.list(p, depth-1); err != nil && !unreadable(err) {
				return err
			}
		}
	}
	return nil
}

func unreadable(err error) bool {
	return absent(err) || errors.Is(err, fs.ErrPermission) || errors.Is(err, unix.ELOOP)
}

func tooMany(n int) error {
	return problemf(connect.CodeResourceExhausted, http.StatusRequestEntityTooLarge,
		"more than %d entries: ask for a subdirectory or a smaller depth", n)
}
