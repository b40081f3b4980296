package files

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// unpacked is the answer of POST /files/archive.
type unpacked struct {
	Path    string `json:"path"`
	Entries int    `json:"entries"`
	Bytes   int64  `json:"bytes"`
}

// unpack answers POST /files/archive; see the package comment.
func (s *Service) unpack(w http.ResponseWriter, r *http.Request) {
	body := &body{r: r.Body, rc: http.NewResponseController(w)}
	r.Body = body
	defer body.release()
	res, err := s.doUnpack(r)
	if err != nil {
		body.drain(r)
		s.reply(w, r, err)
		return
	}
	answer(w, http.StatusOK, res)
}

func (s *Service) doUnpack(r *http.Request) (unpacked, error) {
	query := r.URL.Query()
	u, err := s.caller(r, query)
	if err != nil {
		return unpacked{}, err
	}
	if query.Get("path") == "" {
		return unpacked{}, invalidf("path is required")
	}
	dir, err := resolve(u, query.Get("path"))
	if err != nil {
		return unpacked{}, err
	}
	data, err := decoded(r)
	if err != nil {
		return unpacked{}, err
	}
	x := &unpacker{ctx: r.Context(), user: u}
	if err := x.open(dir); err != nil {
		return unpacked{}, err
	}
	defer x.root.Close()
	if err := x.all(tar.NewReader(bufio.NewReaderSize(data, bufferBytes))); err != nil {
		return unpacked{}, spaceError(err, dir)
	}
	return unpacked{Path: valid(dir), Entries: x.entries, Bytes: x.bytes}, nil
}

// unpacker makes the entries of one archive. All paths go through root, which
// follows no link out of the directory.
type unpacker struct {
	ctx     context.Context
	user    users.User
	root    *os.Root
	made    bool // the directory was made by this call
	entries int
	bytes   int64
	dirs    []attributes // of directories, which wait until these are full
}

func (x *unpacker) open(dir string) error {
	return x.user.Do(func() (err error) {
		if err := os.MkdirAll(path.Dir(dir), dirMode); err != nil {
			return err
		}
		switch err := os.Mkdir(dir, dirMode); {
		case err == nil:
			x.made = true
		case !errors.Is(err, fs.ErrExist):
			return err
		default:
			if err := mustBeDir(dir); err != nil {
				return err
			}
		}
		x.root, err = os.OpenRoot(dir)
		return err
	})
}

func (x *unpacker) all(t *tar.Reader) error {
	for {
		if err := x.ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return x.finish()
		}
		if err != nil {
			return asArchiveFault(err)
		}
		if x.entries++; x.entries > maxArchiveEntries {
			return tooMany(maxArchiveEntries)
		}
		if h.Name, err = entryName(h.Name); err != nil {
			return err
		}
		if err := x.entry(h, t); err != nil {
			return asEntryFault(h.Name, err)
		}
	}
}

// entryName is a clean name below the directory, "." for itself.
func entryName(name string) (string, error) {
	if len(name) > maxPath || strings.IndexByte(name, 0) >= 0 {
		return "", invalidf("the archive has an entry with a bad name")
	}
	clean := path.Clean(name)
	// A ".." that cleaning has taken out may have led through a link.
	if name == "" || strings.HasPrefix(name, "/") || hasDotDot(name) || !filepath.IsLocal(clean) {
		return "", invalidf("the archive has the entry '%s', which leads out of the directory", valid(name))
	}
	return clean, nil
}

func hasDotDot(name string) bool {
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return true
		}
	}
	return false
}

func (x *unpacker) entry(h *tar.Header, data io.Reader) error {
	for k := range h.PAXRecords {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return invalidf("sparse files are not supported")
		}
	}
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	if h.Name == "." && h.Typeflag != tar.TypeDir {
		return invalidf("the directory itself cannot be replaced")
	}
	if h.Typeflag == tar.TypeReg {
		return x.file(h, data)
	}
	return x.user.Do(func() error {
		if err := x.parents(h.Name); err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeDir:
			return x.dir(h)
		case tar.TypeSymlink:
			if err := x.clear(h.Name); err != nil {
				return err
			}
			if err := x.root.Symlink(h.Linkname, h.Name); err != nil {
				return err
			}
			return x.own(attributesOf(h))
		case tar.TypeLink:
			old, err := entryName(h.Linkname)
			if err != nil {
				return err
			}
			if old == h.Name {
				return invalidf("a link to itself")
			}
			if err := x.clear(h.Name); err != nil {
				return err
			}
			return x.root.Link(old, h.Name)
		}
		return invalidf("entries of type %q are not supported", h.Typeflag)
	})
}

// dir makes a directory or takes the one that is there. Until the end it must
// be possible to write into it.
func (x *unpacker) dir(h *tar.Header) error {
	if h.Name == "." {
		if x.made {
			x.dirs = append(x.dirs, attributesOf(h))
		}
		return nil
	}
	if len(x.dirs) == maxArchiveDirs {
		return tooMany(maxArchiveDirs)
	}
	err := x.root.Mkdir(h.Name, 0o700)
	switch {
	case err == nil:
		x.dirs = append(x.dirs, attributesOf(h))
		return nil
	case !errors.Is(err, fs.ErrExist):
		return err
	}
	fi, err := x.root.Lstat(h.Name)
	if err == nil && !fi.IsDir() {
		err = invalidf("in the way is %s", kind(fi.Mode()))
	}
	return err
}

// attributes are what is left to set of an entry once it is there.
type attributes struct {
	name     string
	mode     fs.FileMode
	time     time.Time
	uid, gid int
}

func attributesOf(h *tar.Header) attributes {
	const bits = fs.ModePerm | fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
	return attributes{h.Name, h.FileInfo().Mode() & bits, h.ModTime, h.Uid, h.Gid}
}

// parents makes the directories that an archive does not name.
func (x *unpacker) parents(name string) error {
	if dir := path.Dir(name); dir != "." {
		return x.root.MkdirAll(dir, dirMode)
	}
	return nil
}

// clear removes what an entry takes the place of; a directory stays.
func (x *unpacker) clear(name string) error {
	fi, err := x.root.Lstat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if fi.IsDir() {
		return invalidf("in the way is a directory")
	}
	return x.root.Remove(name)
}

// file writes a regular file. After an error nothing of it is left.
func (x *unpacker) file(h *tar.Header, data io.Reader) error {
	var f *os.File
	err := x.user.Do(func() (err error) {
		if err := x.parents(h.Name); err != nil {
			return err
		}
		if err := x.clear(h.Name); err != nil {
			return err
		}
		f, err = x.root.OpenFile(h.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		return err
	})
	if err != nil {
		return err
	}
	err = fill(x.ctx, x.user, f, data)
	err = errors.Join(err, f.Close())
	if err == nil {
		x.bytes += h.Size
		err = x.user.Do(func() error {
			return x.set(attributesOf(h))
		})
	}
	if err != nil {
		_ = x.user.Do(func() error { return x.root.Remove(h.Name) })
	}
	return err
}

// set gives a file or directory its owner, mode and time, in this order: a
// change of owner clears bits of the mode.
func (x *unpacker) set(a attributes) error {
	if err := x.own(a); err != nil {
		return err
	}
	if err := x.root.Chmod(a.name, a.mode); err != nil {
		return err
	}
	if a.time.Before(time.Unix(0, 0)) {
		return nil
	}
	return x.root.Chtimes(a.name, a.time, a.time)
}

// own gives an entry that root unpacks to the owner in the archive.
func (x *unpacker) own(a attributes) error {
	if x.user.UID != 0 {
		return nil
	}
	const last = 1<<32 - 2
	if a.uid < 0 || a.gid < 0 || a.uid > last || a.gid > last {
		return invalidf("owner %d:%d does not exist", a.uid, a.gid)
	}
	return x.root.Lchown(a.name, a.uid, a.gid)
}

// finish sets what waited, the innermost directories first. No later entry can
// have replaced one: clear keeps directories.
func (x *unpacker) finish() error {
	for _, a := range slices.Backward(x.dirs) {
		if err := x.user.Do(func() error { return x.set(a) }); err != nil {
			return asEntryFault(a.name, err)
		}
	}
	return nil
}

// asArchiveFault blames the archive, unless its carrier failed.
func asArchiveFault(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return invalidf("the archive is damaged: %v", err)
	}
	return err
}

// asEntryFault names the entry. os.Root's refusals have no error of their own.
func asEntryFault(name string, err error) error {
	if strings.Contains(err.Error(), "path escapes from parent") {
		return invalidf("entry '%s' leads out of the directory through a link", valid(name))
	}
	p := asProblem(err)
	if p.status == http.StatusNotFound {
		return invalidf("entry '%s': %s", valid(name), p.msg)
	}
	return problemf(p.code, p.status, "entry '%s': %s", valid(name), p.msg)
}
