package ext4

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// Options say how large a file system may become and how much of it is to be
// free. Zero fields mean the defaults.
type Options struct {
	Label string // volume name, at most 16 bytes
	// MaxBytes bounds the data of all files together, as if none had holes or
	// was replaced later. Default 64 GiB, at most 2 TiB.
	MaxBytes int64
	// MaxFiles bounds the number of names. Default 4 million.
	MaxFiles int64
	// FreeBytes is the least room that the finished file system has left,
	// beside a tenth of its content. Default 64 MiB.
	FreeBytes int64
}

func (o *Options) fill() {
	if o.MaxBytes == 0 {
		o.MaxBytes = 64 << 30
	}
	o.MaxBytes = min(o.MaxBytes, maxGroups*groupBytes)
	if o.MaxFiles == 0 {
		o.MaxFiles = 4 << 20
	}
	if o.FreeBytes == 0 {
		o.FreeBytes = 64 << 20
	}
}

// Writer makes one file system. Names are paths from the file system's root,
// with or without a leading slash; parents that are missing are created, and
// symbolic links among the parents are followed inside the tree. Attributes in
// name spaces that Linux does not keep on ext4 are dropped.
//
// After an error the Writer is of no further use, and what it has written is
// not a file system.
type Writer struct {
	f      *os.File
	opt    Options
	alloc  allocator
	root   *node
	names  int64
	layer  int
	bytes  int64  // given to File so far
	buf    []byte // one chunk of a file on its way
	seed   uint32 // of all metadata checksums
	newest int64  // latest modification, seconds
}

// Stats describe a finished file system.
type Stats struct {
	SizeBytes    int64 // of the file system
	ContentBytes int64 // of the blocks that files and metadata use in it
	Files        int64 // names
}

// chunk is how much of a file is read at a time, 1 MiB.
const chunk = 256 * BlockSize

// holeBlocks is how long a run of zeros must be to become a hole, 1 MiB:
// shorter ones would only cut files into pieces.
const holeBlocks = 256

// New returns a Writer for the empty file f. The caller keeps f.
func New(f *os.File, o Options) *Writer {
	o.fill()
	w := &Writer{f: f, opt: o, alloc: newAllocator(), buf: make([]byte, chunk)}
	w.root = &node{mode: modeDir | 0o755, links: 2, children: map[string]entry{}}
	w.root.parent = w.root
	w.alloc.takeRun(journalBlocks)
	return w
}

func (w *Writer) node(mode uint32, a Attr) (*node, error) {
	n := &node{mode: mode | a.Mode&0o7777, uid: a.UID, gid: a.GID}
	n.sec, n.nsec = clampTime(a.ModTime)
	w.newest = max(w.newest, n.sec)
	var err error
	n.xattrs, err = makeXattrs(a.Xattrs)
	return n, err
}

// Mkdir makes a directory, or gives the one that is there other attributes.
func (w *Writer) Mkdir(name string, a Attr) error {
	n, err := w.node(modeDir, a)
	if err != nil {
		return fmt.Errorf("make directory %q: %w", name, err)
	}
	return w.place(name, n)
}

// Kind is a sort of special file.
type Kind uint32

// The special files.
const (
	FIFO        Kind = modeFIFO
	CharDevice  Kind = modeChar
	BlockDevice Kind = modeBlock
)

// Special makes a device node or FIFO. Major is below 4096, minor
// below 2^20, which is what Linux has.
func (w *Writer) Special(name string, k Kind, major, minor uint32, a Attr) error {
	n, err := w.node(uint32(k), a)
	if err != nil {
		return fmt.Errorf("make special file %q: %w", name, err)
	}
	if major >= 1<<12 || minor >= 1<<20 {
		return fmt.Errorf("make special file %q: device number %d:%d does not exist", name, major, minor)
	}
	n.major, n.minor = major, minor
	return w.place(name, n)
}

// Symlink makes a symbolic link to target, which may be anything of 1 to 4095
// bytes.
func (w *Writer) Symlink(name, target string, a Attr) error {
	n, err := w.node(modeSymlink, a)
	if err != nil {
		return fmt.Errorf("make symbolic link %q: %w", name, err)
	}
	if target == "" || len(target) > maxSymlink {
		return fmt.Errorf("make symbolic link %q: target of %d bytes: %w", name, len(target), ErrName)
	}
	n.mode = modeSymlink | 0o777 // as the kernel has them all
	n.target, n.size = target, int64(len(target))
	if len(target) > maxFastLink {
		if err := w.data(n, bytes.NewReader([]byte(target)), n.size); err != nil {
			return err
		}
	}
	return w.place(name, n)
}

// Link gives the file target a further name.
func (w *Writer) Link(name, target string) error {
	_, _, n, err := w.find(target)
	if err != nil {
		return fmt.Errorf("link %q: %w", name, err)
	}
	if n.isDir() {
		return fmt.Errorf("link %q to %q: %w", name, target, ErrLinkDir)
	}
	if n.links >= maxLinks {
		return fmt.Errorf("link %q to %q: %w: %d names for one", name, target, ErrTooMany, n.links)
	}
	n.links++ // placing may remove target: a link's name can be a directory above it
	err = w.place(name, n)
	n.links--
	return err
}

// File makes a regular file from exactly size bytes of r. A shorter r is
// [io.ErrUnexpectedEOF].
func (w *Writer) File(name string, a Attr, size int64, r io.Reader) error {
	n, err := w.node(modeRegular, a)
	if err != nil {
		return fmt.Errorf("make file %q: %w", name, err)
	}
	if size < 0 || size > w.opt.MaxBytes-w.bytes {
		return fmt.Errorf("make file %q of %d bytes: %w: more than %d bytes", name, size, ErrTooLarge, w.opt.MaxBytes)
	}
	w.bytes += size
	n.size = size
	if err := w.data(n, r, size); err != nil {
		return fmt.Errorf("write file %q: %w", name, err)
	}
	return w.place(name, n)
}

// data copies size bytes of r into blocks of their own and records them in n.
func (w *Writer) data(n *node, r io.Reader, size int64) error {
	var logical, zeros int64 // block at hand; blocks of zeros right before it
	for left := size; left > 0; {
		got := min(left, chunk)
		if _, err := io.ReadFull(r, w.buf[:got]); err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		left -= got
		blocks := ceilDiv(got, BlockSize)
		clear(w.buf[got : blocks*BlockSize])
		for b := int64(0); b < blocks; {
			run := b
			for run < blocks && isZero(w.buf[run*BlockSize:][:BlockSize]) {
				run++
			}
			zeros += run - b
			b = run
			for run < blocks && !isZero(w.buf[run*BlockSize:][:BlockSize]) {
				run++
			}
			if run == b {
				break // the chunk ends in zeros
			}
			if zeros < holeBlocks {
				if err := w.append(n, logical+b-zeros, zeros, nil); err != nil {
					return err
				}
			}
			zeros = 0
			if err := w.append(n, logical+b, run-b, w.buf[b*BlockSize:run*BlockSize]); err != nil {
				return err
			}
			b = run
		}
		logical += blocks
	}
	if zeros > 0 && zeros < holeBlocks {
		return w.append(n, logical-zeros, zeros, nil)
	}
	return nil
}

// append gives n count blocks at logical, filled from p; nil is zeros, which
// need no writing.
func (w *Writer) append(n *node, logical, count int64, p []byte) error {
	for count > 0 {
		start, got := w.alloc.take(count)
		if start+got > maxGroups*groupBlocks {
			return fmt.Errorf("%w: larger than %d bytes", ErrTooLarge, int64(maxGroups)*groupBytes)
		}
		if p != nil {
			if _, err := w.f.WriteAt(p[:got*BlockSize], start*BlockSize); err != nil {
				return err
			}
			p = p[got*BlockSize:]
		}
		n.addExtent(extent{uint32(logical), start, got})
		logical += got
		count -= got
	}
	return nil
}

// addExtent records x, as part of the extent before it where they meet.
func (n *node) addExtent(x extent) {
	if k := len(n.extents); k > 0 {
		last := &n.extents[k-1]
		if last.start+last.count == x.start && int64(last.logical)+last.count == int64(x.logical) &&
			last.count+x.count <= maxExtentLen {
			last.count += x.count
			return
		}
	}
	n.extents = append(n.extents, x)
}

// release frees blocks and makes them read as zeros again.
func (w *Writer) release(start, count int64) error {
	w.alloc.release(start, count)
	for {
		err := unix.Fallocate(int(w.f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, start*BlockSize, count*BlockSize)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EOPNOTSUPP):
			return w.zero(start, count)
		}
		return fmt.Errorf("punch hole: %w", err)
	}
}

// zero overwrites blocks where the host's file system cannot make holes.
func (w *Writer) zero(start, count int64) error {
	b := make([]byte, min(count, 256)*BlockSize)
	for count > 0 {
		n := min(count, 256)
		if _, err := w.f.WriteAt(b[:n*BlockSize], start*BlockSize); err != nil {
			return err
		}
		start, count = start+n, count-n
	}
	return nil
}

var zeroBlock [BlockSize]byte

func isZero(p []byte) bool { return bytes.Equal(p, zeroBlock[:len(p)]) }

// Finish writes all metadata and sets the file's size. It checks ctx now and
// then; it does not sync the file.
func (w *Writer) Finish(ctx context.Context) (Stats, error) {
	p, err := w.plan()
	if err != nil {
		return Stats{}, fmt.Errorf("finish file system: %w", err)
	}
	if err := w.f.Truncate(p.groups * groupBytes); err != nil {
		return Stats{}, fmt.Errorf("finish file system: %w", err)
	}
	for _, step := range []func(context.Context, *plan) error{w.writeNodes, w.writeInodes, w.writeJournal, w.writeResize, w.writeGroups} {
		if err := ctx.Err(); err != nil {
			return Stats{}, err
		}
		if err := step(ctx, p); err != nil {
			return Stats{}, fmt.Errorf("finish file system: %w", err)
		}
	}
	return Stats{
		SizeBytes:    p.groups * groupBytes,
		ContentBytes: (p.groups*groupBlocks - p.freeBlocks) * BlockSize,
		Files:        w.names,
	}, nil
}

// writeBlock writes one block.
func (w *Writer) writeBlock(b int64, p []byte) error {
	_, err := w.f.WriteAt(p, b*BlockSize)
	return err
}
