package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/image/ext4"
)

const (
	whiteout       = ".wh."
	whiteoutMeta   = ".wh..wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// unpacker puts tar streams, one over the other, into a file system.
type unpacker struct {
	fs *ext4.Writer
	// streamBytes bounds all streams together, uncompressed, headers and
	// padding included: a bomb costs no more than an honest image.
	streamBytes int64
	// extras are copied out as files of dir while they pass: the file whose
	// name is dest for each path that matches the pattern.
	dir    string
	extras map[string]string // pattern → dest

	stage    string
	progress domain.ProgressFunc
	entries  int64
}

// apply reads one tar stream to its end. With whiteouts it is a layer: names
// beginning with ".wh." take away what earlier layers brought. r must end when
// ctx does.
func (u *unpacker) apply(ctx context.Context, r io.Reader, whiteouts bool) error {
	in := &meter{ctx: ctx, r: r, left: &u.streamBytes}
	tr := tar.NewReader(in)
	before := u.entries
	for {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return in.explain(err)
		}
		if u.entries++; u.entries%256 == 0 {
			u.progress.Report(domain.Progress{Stage: u.stage, Done: u.entries})
		}
		if err := u.entry(h, tr, whiteouts); err != nil {
			return in.explain(err)
		}
	}
	// What follows the end mark counts for the digest and is otherwise nothing.
	if _, err := io.Copy(io.Discard, in); err != nil {
		return in.explain(err)
	}
	switch {
	case whiteouts: // a layer has a digest, and some tools end them early
		return nil
	case in.n < blockBytes && u.entries == before:
		return fmt.Errorf("%w: %w", errArchive, errEmpty)
	case !in.endMark():
		// Cut between two entries, nothing else would tell.
		return fmt.Errorf("%w: cut short after %d bytes: no end mark: %w", errArchive, in.n, io.ErrUnexpectedEOF)
	}
	return nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader, whiteouts bool) error {
	if whiteouts {
		dir, base := path.Split(path.Clean("/" + h.Name))
		switch {
		case base == whiteoutOpaque:
			return u.fs.ClearLower(dir)
		case strings.HasPrefix(base, whiteoutMeta): // of a storage driver
			return nil
		case strings.HasPrefix(base, whiteout):
			return u.fs.Remove(dir + strings.TrimPrefix(base, whiteout))
		}
	}
	a, err := attributes(h)
	if err != nil {
		return err
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont, tar.TypeGNUSparse:
		return u.file(h, a, r)
	case tar.TypeDir:
		return u.fs.Mkdir(h.Name, a)
	case tar.TypeSymlink:
		return u.fs.Symlink(h.Name, h.Linkname, a)
	case tar.TypeLink:
		return u.fs.Link(h.Name, h.Linkname)
	case tar.TypeChar:
		return u.special(h, ext4.CharDevice, a)
	case tar.TypeBlock:
		return u.special(h, ext4.BlockDevice, a)
	case tar.TypeFifo:
		return u.fs.Special(h.Name, ext4.FIFO, 0, 0, a)
	case tar.TypeXGlobalHeader:
		return nil
	}
	return fmt.Errorf("%w: %q is of the unknown type %q", errArchive, h.Name, h.Typeflag)
}

func (u *unpacker) special(h *tar.Header, k ext4.Kind, a ext4.Attr) error {
	if h.Devmajor < 0 || h.Devminor < 0 || h.Devmajor >= 1<<32 || h.Devminor >= 1<<32 {
		return fmt.Errorf("%w: %q has the device number %d:%d", errArchive, h.Name, h.Devmajor, h.Devminor)
	}
	return u.fs.Special(h.Name, k, uint32(h.Devmajor), uint32(h.Devminor), a)
}

func (u *unpacker) file(h *tar.Header, a ext4.Attr, r io.Reader) (err error) {
	name := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
	for pattern, dest := range u.extras {
		if ok, _ := path.Match(pattern, name); !ok {
			continue
		}
		// The last that matches wins, as the newest of several kernels does.
		f, err := os.Create(filepath.Join(u.dir, dest))
		if err != nil {
			return err
		}
		defer func() {
			if err == nil {
				err = errors.Join(f.Sync(), f.Chmod(0o444))
			}
			err = errors.Join(err, f.Close())
		}()
		r = io.TeeReader(r, f)
		break
	}
	return u.fs.File(h.Name, a, h.Size, r)
}

// attributes reads what a header says beside name and content.
func attributes(h *tar.Header) (ext4.Attr, error) {
	if h.Uid < 0 || h.Gid < 0 || int64(h.Uid) >= 1<<32-1 || int64(h.Gid) >= 1<<32-1 {
		return ext4.Attr{}, fmt.Errorf("%w: %q belongs to %d:%d", errArchive, h.Name, h.Uid, h.Gid)
	}
	a := ext4.Attr{Mode: uint32(h.Mode & 0o7777), UID: uint32(h.Uid), GID: uint32(h.Gid), ModTime: h.ModTime}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			if a.Xattrs == nil {
				a.Xattrs = map[string][]byte{}
			}
			a.Xattrs[name] = []byte(value)
		}
	}
	return a, nil
}

// meter reads from r until ctx is done or *left bytes have gone by, and
// remembers whether it was r that failed.
type meter struct {
	ctx  context.Context // lives as long as one call of apply
	r    io.Reader
	left *int64
	n    int64
	err  error  // of r, if not the end
	tail []byte // the last bytes read, blockBytes at the most
}

const blockBytes = 512 // of a tar

// endMark reports whether the stream ended in a block of zeros.
func (m *meter) endMark() bool {
	return len(m.tail) == blockBytes && strings.Trim(string(m.tail), "\x00") == ""
}

func (m *meter) Read(p []byte) (int, error) {
	if m.err = m.ctx.Err(); m.err != nil {
		return 0, m.err
	}
	n, err := m.r.Read(p)
	m.n += int64(n)
	m.tail = append(m.tail, p[max(0, n-blockBytes):n]...)
	m.tail = append(m.tail[:0], m.tail[max(0, len(m.tail)-blockBytes):]...)
	*m.left -= int64(n)
	switch {
	case *m.left < 0:
		m.err = errTooLarge
		return 0, m.err
	case err != nil && !errors.Is(err, io.EOF):
		m.err = err
	}
	return n, err
}

// explain tells a source that failed from an archive that is wrong in itself.
func (m *meter) explain(err error) error {
	if m.err != nil {
		return m.err
	}
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, tar.ErrFieldTooLong) || errors.Is(err, io.ErrUnexpectedEOF) {
		return fmt.Errorf("%w: damaged or cut short after %d bytes: %w", errArchive, m.n, err)
	}
	return err
}
