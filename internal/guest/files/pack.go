package files

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"path"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/guest/users"
)

// Bounds of archives, in and out.
const (
	maxArchiveEntries = 1_000_000
	maxArchiveNames   = 200_000 // in one directory
	maxArchiveDirs    = 100_000 // made by unpacking
	maxArchiveLinks   = 100_000 // files with several names that are remembered
	maxArchiveDepth   = maxListDepth
)

// archiveError is the trailer that says why an archive has no end.
const archiveError = "X-Agentiso-Error"

// pack answers GET /files/archive; see the package comment.
func (s *Service) pack(w http.ResponseWriter, r *http.Request) {
	query := r.URL.Query()
	u, err := s.caller(r, query)
	if err != nil {
		s.reply(w, r, err)
		return
	}
	root, err := resolve(u, query.Get("path"))
	if err != nil {
		s.reply(w, r, err)
		return
	}
	p := &packer{ctx: r.Context(), user: u, links: map[inode]string{}}
	fi, err := p.lstat(root)
	if err == nil && fi.IsDir() {
		// The first error should be an answer, not a trailer.
		err = u.Do(func() error { f, err := os.Open(root); f.Close(); return err })
	}
	if absent(err) {
		err = absentf("path '%s' does not exist", valid(root))
	}
	if err != nil {
		s.reply(w, r, err)
		return
	}
	h := w.Header()
	h.Set("Content-Type", "application/x-tar")
	h.Set("Trailer", archiveError)
	if r.Method == http.MethodHead {
		return
	}
	out := &bulkWriter{ResponseWriter: w, rc: http.NewResponseController(w)}
	defer out.release()
	// Headers and small files would each be a write of the link.
	small := bufio.NewWriterSize(out, bufferBytes)
	p.tar = tar.NewWriter(small)
	if fi.IsDir() {
		err = p.add(root, "./", fi, 0)
	} else {
		err = p.add(root, path.Base(root), fi, 0)
	}
	if err == nil {
		err = p.tar.Close()
	}
	if ferr := small.Flush(); err == nil {
		err = ferr
	}
	if err != nil {
		h.Set(archiveError, headerText(asProblem(err).msg))
	}
}

// headerText makes msg fit for a header.
func headerText(msg string) string {
	b := []byte(msg)
	for i, c := range b {
		if c < ' ' || c > '~' {
			b[i] = '?'
		}
	}
	return string(b[:min(len(b), 1024)])
}

// packer writes one tree. It becomes the user for each step rather than for the
// whole, because writing to the link may take for ever.
type packer struct {
	ctx     context.Context
	user    users.User
	tar     *tar.Writer
	links   map[inode]string // names of files that have more than one
	entries int
}

func (p *packer) lstat(name string) (fi fs.FileInfo, err error) {
	err = p.user.Do(func() error { fi, err = os.Lstat(name); return err })
	return fi, err
}

// add writes what is at the path full under the name.
func (p *packer) add(full, name string, fi fs.FileInfo, depth int) error {
	if err := p.ctx.Err(); err != nil {
		return err
	}
	if p.entries++; p.entries > maxArchiveEntries {
		return tooMany(maxArchiveEntries)
	}
	if depth > maxArchiveDepth {
		return invalidf("'%s' is nested too deeply", valid(full))
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok {
		return fmt.Errorf("pack %s: no file status", full)
	}
	h := &tar.Header{
		Name:    name,
		Mode:    int64(st.Mode & 0o7777),
		Uid:     int(st.Uid),
		Gid:     int(st.Gid),
		ModTime: fi.ModTime().Truncate(time.Second),
	}
	switch {
	case fi.IsDir():
		h.Typeflag = tar.TypeDir
		if err := p.tar.WriteHeader(h); err != nil {
			return err
		}
		return p.addAll(full, name, depth)
	case fi.Mode()&fs.ModeSymlink != 0:
		h.Typeflag = tar.TypeSymlink
		err := p.user.Do(func() (err error) { h.Linkname, err = os.Readlink(full); return err })
		if err != nil {
			return p.unlessGone(err)
		}
		return p.tar.WriteHeader(h)
	case fi.Mode().IsRegular():
		return p.addFile(full, h)
	}
	return nil // a socket, FIFO or device
}

func (p *packer) addAll(full, name string, depth int) error {
	var names []string
	err := p.user.Do(func() (err error) {
		names, err = readNames(full, maxArchiveNames)
		return err
	})
	if err != nil {
		return p.unlessGone(err)
	}
	prefix := name
	if name == "./" {
		prefix = ""
	}
	for _, n := range names {
		child := filepath.Join(full, n)
		fi, err := p.lstat(child)
		if err != nil {
			if err = p.unlessGone(err); err != nil {
				return err
			}
			continue
		}
		entry := prefix + n
		if fi.IsDir() {
			entry += "/"
		}
		if err := p.add(child, entry, fi, depth+1); err != nil {
			return err
		}
	}
	return nil
}

// unlessGone passes over what was removed while the archive was being made.
func (p *packer) unlessGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

func (p *packer) addFile(full string, h *tar.Header) error {
	var f *os.File
	err := p.user.Do(func() (err error) {
		f, err = os.OpenFile(full, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY|unix.O_NOFOLLOW, 0)
		return err
	})
	if err != nil {
		return p.unlessGone(err)
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return err
	}
	st, ok := fi.Sys().(*syscall.Stat_t)
	if !ok || !fi.Mode().IsRegular() {
		return nil // something else has taken its place
	}
	h.Typeflag, h.Size = tar.TypeReg, fi.Size()
	if st.Nlink > 1 {
		id := inode{st.Dev, st.Ino}
		if first, ok := p.links[id]; ok {
			h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			return p.tar.WriteHeader(h)
		}
		if len(p.links) < maxArchiveLinks {
			p.links[id] = h.Name
		}
	}
	if err := p.tar.WriteHeader(h); err != nil {
		return err
	}
	return p.copy(f, h.Size)
}

// copy writes exactly size bytes, as the header says: a file that has shrunk
// since is filled up with zeros, as other archivers do.
func (p *packer) copy(f *os.File, size int64) error {
	buf := buffers.Get().(*[bufferBytes]byte)
	defer buffers.Put(buf)
	for size > 0 {
		if err := p.ctx.Err(); err != nil {
			return err
		}
		b := buf[:min(size, bufferBytes)]
		n, err := readFull(untilDry{f}, b)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(b[n:])
		if _, err := p.tar.Write(b); err != nil {
			return err
		}
		size -= int64(len(b))
	}
	return nil
}
