package files

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"sync"
	"syscall"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// fileMode is what a new file gets before the umask.
const fileMode = 0o644

// write makes data the content of the file p, as u, and meta its metadata. size
// is what data will hold at most, or -1. The package comment says what becomes
// of an existing file and of one that cannot be finished.
func (s *Service) write(ctx context.Context, u users.User, p string, data io.Reader, size int64, meta map[string]string) (err error) {
	t, done, err := s.claim(ctx, u, p)
	if err != nil {
		return err
	}
	defer done()
	began := false
	defer func() {
		if err != nil && began {
			err = errors.Join(err, t.empty(u))
		}
		if err != nil {
			t.abandon(u)
			return
		}
		err = t.f.Close()
	}()
	if err := t.fits(u, size); err != nil {
		return err
	}
	if err := u.Do(func() error { return attrsOf(t.f).replace(meta) }); err != nil {
		return err
	}
	began = true
	if err := u.Do(t.truncate); err != nil {
		return err
	}
	if err := fill(ctx, u, t.f, data); err != nil {
		return spaceError(err, p)
	}
	return nil
}

// claimTries bounds how often a file may vanish between being opened and being
// this upload's turn.
const claimTries = 10

// claim opens the file p and waits for its turn. The caller ends the turn by
// done, after it has closed or abandoned the target.
func (s *Service) claim(ctx context.Context, u users.User, p string) (t *target, done func(), err error) {
	for range claimTries {
		if t, err = openTarget(u, p); err != nil {
			return nil, nil, err
		}
		if done, err = s.turns.take(ctx, t.id); err != nil {
			t.f.Close()
			return nil, nil, err
		}
		// An upload that failed before this one may have removed the file.
		var st unix.Stat_t
		err = u.Do(func() error { return unix.Stat(p, &st) })
		if err == nil && t.id == (inode{st.Dev, st.Ino}) {
			return t, done, nil
		}
		t.f.Close()
		done()
	}
	return nil, nil, problemf(connect.CodeAborted, http.StatusConflict, "'%s' is being replaced by somebody else", valid(p))
}

// target is an open file that is to be overwritten.
type target struct {
	path string
	f    *os.File
	id   inode
	made bool // by us: nobody had it before
}

// openTarget opens or makes the file p and its parents. Nothing is opened that
// is not a regular file.
func openTarget(u users.User, p string) (*target, error) {
	t := &target{path: p}
	err := u.Do(func() (err error) {
		fi, err := os.Stat(p)
		switch {
		case err == nil:
			if !fi.Mode().IsRegular() {
				return invalidf("path '%s' is %s", valid(p), kind(fi.Mode()))
			}
			t.f, err = os.OpenFile(p, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
			return err
		case !errors.Is(err, fs.ErrNotExist):
			return err
		}
		if err := os.MkdirAll(path.Dir(p), dirMode); err != nil {
			return err
		}
		t.f, err = os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, fileMode)
		t.made = err == nil
		if errors.Is(err, fs.ErrExist) {
			// Another upload was faster, or p is a link to what is not there
			// yet.
			t.f, err = os.OpenFile(p, os.O_WRONLY|os.O_CREATE|unix.O_NONBLOCK|unix.O_NOCTTY, fileMode)
		}
		return err
	})
	if err != nil {
		return nil, spaceError(err, p)
	}
	fi, err := t.f.Stat()
	if err != nil {
		t.abandon(u)
		return nil, err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		t.abandon(u)
		return nil, invalidf("path '%s' is %s", valid(p), kind(fi.Mode()))
	}
	t.id = inode{st.Dev, st.Ino}
	return t, nil
}

// fits refuses a size for which there is no room, while the old content still
// stands.
func (t *target) fits(u users.User, size int64) error {
	if size <= 0 {
		return nil
	}
	var fs unix.Statfs_t
	var st unix.Stat_t
	fd := int(t.f.Fd())
	if unix.Fstatfs(fd, &fs) != nil || unix.Fstat(fd, &st) != nil {
		return nil // the write will tell
	}
	free := fs.Bavail
	if u.UID == 0 {
		free = fs.Bfree // the reserved blocks too
	}
	room := int64(free)*fs.Bsize + st.Blocks*512
	if fs.Blocks == 0 || size <= room { // no blocks: a file system of the kernel
		return nil
	}
	return spaceError(unix.ENOSPC, t.path)
}

// truncate empties the file. Files of /proc and /sys are what they are.
func (t *target) truncate() error {
	if err := t.f.Truncate(0); err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.EPERM) {
		return err
	}
	return nil
}

// empty leaves no half of a file that was there before.
func (t *target) empty(u users.User) error {
	if t.made {
		return nil
	}
	return u.Do(t.truncate)
}

// abandon closes the file, and removes it if it was made by us and still is
// what stands at its path.
func (t *target) abandon(u users.User) {
	if t.made {
		_ = u.Do(func() error {
			a, err := t.f.Stat()
			if err != nil {
				return err
			}
			if b, err := os.Lstat(t.path); err != nil || !os.SameFile(a, b) {
				return err
			}
			return os.Remove(t.path)
		})
	}
	t.f.Close()
}

// fill copies data into f in pieces of one buffer each, written as u: so the
// kernel applies u's quota and takes away set-user-id bits as it would for u.
func fill(ctx context.Context, u users.User, f *os.File, data io.Reader) error {
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, end := readFull(data, buf[:])
		if n > 0 {
			if err := u.Do(func() error { _, err := f.Write(buf[:n]); return err }); err != nil {
				return err
			}
		}
		switch {
		case end == nil:
		case errors.Is(end, io.EOF):
			return nil
		case errors.Is(end, io.ErrUnexpectedEOF):
			return invalidf("the body ended too early")
		default:
			return end
		}
	}
}

// readFull reads until b is full or r ends. Unlike io.ReadFull it hands on r's
// own error: a body that was cut off must not look like one that has ended.
func readFull(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func spaceError(err error, p string) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return &fs.PathError{Op: "write", Path: p, Err: unix.ENOSPC}
	}
	return err
}

// inode names a file whatever its paths are.
type inode struct {
	dev, ino uint64
}

// turns lets the uploads to one file wait for one another.
type turns struct {
	mu     sync.Mutex
	queues map[inode]chan struct{} // closed when the holder is done
}

// take waits for the turn of id, or for ctx. The caller ends its turn by done.
func (t *turns) take(ctx context.Context, id inode) (done func(), err error) {
	for {
		t.mu.Lock()
		busy, taken := t.queues[id]
		if !taken {
			mine := make(chan struct{})
			if t.queues == nil {
				t.queues = map[inode]chan struct{}{}
			}
			t.queues[id] = mine
			t.mu.Unlock()
			return func() {
				t.mu.Lock()
				delete(t.queues, id)
				t.mu.Unlock()
				close(mine)
			}, nil
		}
		t.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, fmt.Errorf("wait for another upload to the same file: %w", ctx.Err())
		}
	}
}
