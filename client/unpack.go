package client

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// maxLater bounds how many directories get their mode and time in the end: a
// hostile guest could send names without end. The rest keep what they were
// made with.
const maxLater = 1 << 20

// unpacker writes what a guest sends, which may be hostile: everything goes
// through an os.Root, so that no name and no link leads out of the copy.
type unpacker struct {
	root     *os.Root
	dir      string // root's path, for messages
	single   string // the local name of the one file to come; "" for a directory
	made     bool   // the directory is new: it gets the mode and time of "./"
	result   *Copied
	progress func(done, total int64)
	total    int64

	buf   [copyBlock]byte
	later []dirMeta
}

type dirMeta struct {
	name string
	mode fs.FileMode
	time time.Time
}

// maxTrailing bounds what is read after an archive's end mark to reach the
// stream's own end, which tells whether it is whole. tar pads to 10 KiB.
const maxTrailing = 1 << 20

func (u *unpacker) unpack(stream io.Reader) error {
	tr := tar.NewReader(stream)
	for n := 0; ; n++ {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return remoteError(err)
		}
		if u.single != "" {
			if n > 0 || !regular(h) {
				return remoteError(errors.New("the agent sent something else than one file"))
			}
			h.Name = u.single
		}
		if err := u.entry(h, tr); err != nil {
			return err
		}
	}
	if _, err := io.Copy(io.Discard, io.LimitReader(stream, maxTrailing)); err != nil {
		return remoteError(err)
	}
	if u.single != "" && u.result.Files == 0 {
		return remoteError(errors.New("the agent sent no file"))
	}
	return u.finish()
}

// remoteError names an error of the guest's side of a copy.
func remoteError(err error) error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	return &Error{Kind: Unavailable, Message: "in the workspace: " + err.Error(), Guest: true, Err: err}
}

func (u *unpacker) entry(h *tar.Header, contents io.Reader) error {
	name := path.Clean(h.Name)
	if !filepath.IsLocal(name) {
		return remoteError(fmt.Errorf("the agent sent the name %q, which leads out of the copy", cut(h.Name)))
	}
	var err error
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.directory(name, h)
	case tar.TypeReg:
		err = u.file(name, h, contents)
	case tar.TypeSymlink:
		err = u.replace(name, func(tmp string) error { return u.root.Symlink(h.Linkname, tmp) })
	case tar.TypeLink:
		old := path.Clean(h.Linkname)
		if !filepath.IsLocal(old) {
			return remoteError(fmt.Errorf("the agent sent the link %q to %q, which leads out of the copy", cut(h.Name), cut(h.Linkname)))
		}
		err = u.replace(name, func(tmp string) error { return u.root.Link(old, tmp) })
	default:
		u.result.skip(name)
		return nil
	}
	if err != nil {
		if _, ok := errors.AsType[*Error](err); ok {
			return err
		}
		return localError(fmt.Errorf("write %s: %w", filepath.Join(u.dir, name), bare(err)))
	}
	u.result.Files++
	return nil
}

func (u *unpacker) directory(name string, h *tar.Header) error {
	fresh := true
	if err := u.root.MkdirAll(path.Dir(name), 0o777); err != nil {
		return err
	}
	// Writable for us until its contents are there, whatever its mode.
	if err := u.root.Mkdir(name, 0o700|permissions(h)); errors.Is(err, fs.ErrExist) {
		fresh = name == "." && u.made
		if st, err := u.root.Stat(name); err != nil || !st.IsDir() {
			return fmt.Errorf("it exists and is not a directory")
		}
	} else if err != nil {
		return err
	}
	// A directory that was there keeps its mode and time.
	if fresh && len(u.later) < maxLater {
		u.later = append(u.later, dirMeta{name, permissions(h), h.ModTime})
	}
	return nil
}

func (u *unpacker) file(name string, h *tar.Header, contents io.Reader) error {
	if st, err := u.root.Stat(name); err == nil && !st.Mode().IsRegular() && !st.IsDir() && u.single != "" {
		return u.into(name, contents) // a device or a FIFO that the user named
	}
	return u.replace(name, func(tmp string) error {
		f, err := u.root.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := u.pour(f, contents); err != nil {
			_ = f.Close()
			return err
		}
		if err := f.Chmod(permissions(h)); err != nil {
			_ = f.Close()
			return err
		}
		if err := f.Close(); err != nil {
			return err
		}
		return u.root.Chtimes(tmp, h.ModTime, h.ModTime)
	})
}

func (u *unpacker) into(name string, contents io.Reader) error {
	f, err := u.root.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	if err := u.pour(f, contents); err != nil {
		_ = f.Close()
		return err
	}
	return f.Close()
}

// pour copies contents, telling apart which side failed.
func (u *unpacker) pour(f *os.File, contents io.Reader) error {
	src := &tally{r: contents, result: u.result, total: u.total, progress: u.progress}
	for {
		n, err := src.Read(u.buf[:])
		if n > 0 {
			if _, werr := f.Write(u.buf[:n]); werr != nil {
				return werr
			}
		}
		if err == io.EOF { //nolint:errorlint // io.Reader's contract
			return nil
		}
		if err != nil {
			return remoteError(err)
		}
	}
}

// replace makes a file beside name and moves it there when it is whole, so
// that a copy that breaks off leaves no half file.
func (u *unpacker) replace(name string, create func(tmp string) error) error {
	if err := u.root.MkdirAll(path.Dir(name), 0o777); err != nil {
		return err
	}
	tmp := path.Join(path.Dir(name), ".agentiso-"+strconv.FormatUint(rand.Uint64(), 36))
	if err := create(tmp); err != nil {
		_ = u.root.Remove(tmp)
		return err
	}
	if err := u.root.Rename(tmp, name); err != nil {
		_ = u.root.Remove(tmp)
		return err
	}
	return nil
}

// finish gives directories their modes and times, the deepest first.
func (u *unpacker) finish() error {
	for _, d := range slices.Backward(u.later) {
		if err := errors.Join(u.root.Chmod(d.name, d.mode), u.root.Chtimes(d.name, d.time, d.time)); err != nil {
			return localError(fmt.Errorf("finish %s: %w", filepath.Join(u.dir, d.name), bare(err)))
		}
	}
	return nil
}

// permissions leaves out set-user-id and its like: a guest does not get to
// make programs of the host.
func permissions(h *tar.Header) fs.FileMode { return h.FileInfo().Mode().Perm() }

// bare strips operation and path, which the message names better; the system's
// own error stays to be found.
func bare(err error) error {
	if n, ok := errors.AsType[syscall.Errno](err); ok {
		return n
	}
	return err
}

// cut bounds a name that is printed because it is wrong.
func cut(s string) string {
	const limit = 100
	if len(s) > limit {
		return strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}
