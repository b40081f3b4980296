package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"

	"golang.org/x/sys/unix"
)

// root is the guest's root directory, written to as if every name in it had
// been chosen by an enemy. Directories are looked up with openat2: symbolic
// links on the way are taken relative to the root and never lead out of it, and
// the links of /proc are refused. The file itself is never followed: it is
// replaced by rename, whatever it was, or written in place only if it is a
// regular file on which something is mounted.
type root struct {
	fd int
}

func openRoot(dir string) (*root, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open root %s: %w", dir, err)
	}
	return &root{fd}, nil
}

func (r *root) close() { _ = unix.Close(r.fd) }

// dir opens a directory, making it if its parent is there.
func (r *root) dir(name string) (int, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(r.fd, name, how)
	if errors.Is(err, unix.ENOENT) {
		if err := unix.Mkdirat(r.fd, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
			return -1, fmt.Errorf("make directory /%s: %w", name, err)
		}
		fd, err = unix.Openat2(r.fd, name, how)
	}
	if err != nil {
		return -1, fmt.Errorf("open directory /%s: %w", name, err)
	}
	return fd, nil
}

// replace makes name (relative, in a directory of the root) a regular file with
// the given content and mode, all of it or nothing. It is not synced: after a
// crash the machine is configured anew.
func (r *root) replace(name string, data []byte, mode uint32) error {
	dir, err := r.dir(path.Dir(name))
	if err != nil {
		return err
	}
	defer unix.Close(dir)
	base := path.Base(name)
	if same(dir, base, data, mode) {
		return nil
	}
	// A fixed name, so that a crash leaves at most one behind.
	tmp := ".agentiso-" + base
	if err := unix.Unlinkat(dir, tmp, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("replace /%s: remove what is in the way: %w", name, err)
	}
	fd, err := unix.Openat(dir, tmp, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("replace /%s: %w", name, err)
	}
	err = fill(fd, data, mode)
	if err == nil {
		err = unix.Renameat(dir, tmp, dir, base)
	}
	if err == nil {
		return nil
	}
	_ = unix.Unlinkat(dir, tmp, 0)
	if errors.Is(err, unix.EBUSY) {
		err = overwrite(dir, base, data)
	}
	if err != nil {
		return fmt.Errorf("replace /%s: %w", name, err)
	}
	return nil
}

// fill writes a new file and closes it.
func fill(fd int, data []byte, mode uint32) error {
	f := os.NewFile(uintptr(fd), "")
	err := unix.Fchmod(fd, mode)
	if err == nil {
		_, err = f.Write(data)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return cause(err)
}

// overwrite writes into a file that cannot be replaced because something is
// mounted on it, as systemd does with /etc/machine-id.
func overwrite(dir int, base string, data []byte) error {
	f, _, err := openRegular(dir, base, unix.O_WRONLY)
	if err != nil {
		return err
	}
	err = f.Truncate(0)
	if err == nil {
		_, err = f.Write(data)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return cause(err)
}

// same reports whether base already is what replace would make.
func same(dir int, base string, data []byte, mode uint32) bool {
	f, st, err := openRegular(dir, base, unix.O_RDONLY)
	if err != nil {
		return false
	}
	defer f.Close()
	if st.Size != int64(len(data)) || st.Mode&0o7777 != mode || st.Uid != 0 || st.Nlink != 1 {
		return false
	}
	b, err := io.ReadAll(io.LimitReader(f, int64(len(data))+1))
	return err == nil && bytes.Equal(b, data)
}

// read returns the content of a file; nil if there is none. Symbolic links stay
// within the root. The error names the file.
func (r *root) read(name string, limit int64) ([]byte, error) {
	how := &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	}
	fd, err := unix.Openat2(r.fd, name, how)
	if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("open /%s: %w", name, err)
	}
	f, _, err := regular(fd)
	if err != nil {
		return nil, fmt.Errorf("read /%s: %w", name, err)
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("read /%s: %w", name, cause(err))
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("read /%s: larger than %d bytes", name, limit)
	}
	return b, nil
}

// openRegular opens base in dir if it is a regular file and no link.
func openRegular(dir int, base string, flags int) (*os.File, *unix.Stat_t, error) {
	fd, err := unix.Openat(dir, base, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	return regular(fd)
}

// regular takes fd over; it fails if it is not a regular file.
func regular(fd int) (*os.File, *unix.Stat_t, error) {
	var st unix.Stat_t
	err := unix.Fstat(fd, &st)
	if err == nil && st.Mode&unix.S_IFMT != unix.S_IFREG {
		err = errors.New("not a regular file")
	}
	if err != nil {
		_ = unix.Close(fd)
		return nil, nil, err
	}
	return os.NewFile(uintptr(fd), ""), &st, nil
}

// cause strips what os puts around the error of a file without a name.
func cause(err error) error {
	if p, ok := errors.AsType[*os.PathError](err); ok {
		return p.Err
	}
	return err
}
