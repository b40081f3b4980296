package initrd

import (
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
)

// The type bits of a mode, as in stat(2); cpio carries them verbatim.
const (
	typeChar    = 0o020000
	typeDir     = 0o040000
	typeRegular = 0o100000
	typeSymlink = 0o120000
)

const (
	trailerName = "TRAILER!!!"
	// maxName is PATH_MAX, the longest name that the kernel's unpacker takes.
	maxName = 4096
	// maxFile is the newc format's own limit: sizes are 32 bits.
	maxFile = 1<<32 - 1
)

// Writer writes a cpio archive in the "newc" format (magic 070701), the one
// that the kernel unpacks (Documentation/driver-api/early-userspace/
// buffer-format.rst). Everything belongs to root and carries time zero, so that
// equal contents are equal bytes. An error is sticky. Writer does not buffer.
type Writer struct {
	w   io.Writer
	off int64
	ino uint32
	err error
}

// NewWriter returns a Writer on w. The caller keeps w and closes it.
func NewWriter(w io.Writer) *Writer { return &Writer{w: w} }

// Dir adds a directory. Parents are not implied: add them first.
func (w *Writer) Dir(name string, perm uint32) error {
	return w.entry(name, typeDir|perm&0o7777, 2, 0, 0, 0, nil)
}

// File adds a regular file of exactly size bytes read from r.
func (w *Writer) File(name string, perm uint32, size int64, r io.Reader) error {
	return w.entry(name, typeRegular|perm&0o7777, 1, size, 0, 0, r)
}

// Symlink adds a symbolic link to target.
func (w *Writer) Symlink(name, target string) error {
	return w.entry(name, typeSymlink|0o777, 1, int64(len(target)), 0, 0, strings.NewReader(target))
}

// CharDevice adds a character device node.
func (w *Writer) CharDevice(name string, perm, major, minor uint32) error {
	return w.entry(name, typeChar|perm&0o7777, 1, 0, major, minor, nil)
}

// Close writes the trailer and pads to the 512-byte blocks of tape days, which
// some readers of the format still want. It does not close the underlying
// writer.
func (w *Writer) Close() error {
	if w.err != nil {
		return w.err
	}
	w.header(trailerName, 0, 1, 0, 0, 0, 0)
	w.pad(512)
	err := w.err
	if err == nil {
		w.err = errors.New("cpio writer is closed")
	}
	return err
}

func (w *Writer) entry(name string, mode, nlink uint32, size int64, major, minor uint32, r io.Reader) error {
	if w.err != nil {
		return w.err
	}
	if !validName(name) {
		return w.fail(fmt.Errorf("add %q: not a clean relative path of at most %d bytes", name, maxName-1))
	}
	if size < 0 || size > maxFile {
		return w.fail(fmt.Errorf("add %s: %d bytes do not fit the format", name, size))
	}
	w.ino++
	w.header(name, mode, nlink, size, w.ino, major, minor)
	if w.err != nil || size == 0 {
		return w.err
	}
	n, err := io.CopyN(w.w, r, size)
	w.off += n
	if err != nil {
		return w.fail(fmt.Errorf("add %s: copied %d of %d bytes: %w", name, n, size, err))
	}
	w.pad(4)
	return w.err
}

func (w *Writer) header(name string, mode, nlink uint32, size int64, ino, major, minor uint32) {
	h := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		ino, mode, 0, 0, nlink, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	w.write([]byte(h))
	w.pad(4)
}

func (w *Writer) pad(align int64) {
	if n := -w.off & (align - 1); n > 0 {
		w.write(make([]byte, n))
	}
}

func (w *Writer) write(b []byte) {
	if w.err != nil {
		return
	}
	n, err := w.w.Write(b)
	w.off += int64(n)
	w.err = err
}

func (w *Writer) fail(err error) error {
	w.err = err
	return err
}

func validName(name string) bool {
	return name != "" && len(name) < maxName && name != trailerName && name != "." &&
		!strings.HasPrefix(name, "/") && path.Clean(name) == name &&
		name != ".." && !strings.HasPrefix(name, "../") && strings.IndexByte(name, 0) < 0
}
