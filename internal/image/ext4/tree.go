package ext4

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// Errors of a tree that cannot be: all are the archive's fault.
var (
	ErrEscape    = errors.New("name leads out of the image")
	ErrName      = errors.New("name is too long, too deep or empty")
	ErrNotDir    = errors.New("a parent is not a directory")
	ErrIsRoot    = errors.New("the root can only be a directory")
	ErrLoop      = errors.New("too many symbolic links")
	ErrNotFound  = errors.New("no such file in the image")
	ErrLinkDir   = errors.New("hard link to a directory")
	ErrTooMany   = errors.New("too many files")
	ErrTooLarge  = errors.New("too much data")
	ErrAttribute = errors.New("extended attributes do not fit")
)

const (
	maxPathLen = 4096
	maxDepth   = 2048 // what fits in PATH_MAX
	maxHops    = 40   // as the kernel follows
)

// Attr is what every file has. The zero value of a field is a value like any
// other.
type Attr struct {
	Mode    uint32 // permission bits, set-id and sticky: 07777
	UID     uint32
	GID     uint32
	ModTime time.Time
	Xattrs  map[string][]byte // full names, "user.mime"; see [Writer] for those dropped
}

// node is one inode.
type node struct {
	mode     uint32
	uid, gid uint32
	sec      int64
	nsec     int64
	links    uint32 // names; of a directory: subdirectories and 2
	xattrs   []xattr
	size     int64
	extents  []extent
	target   string // of a symbolic link
	major    uint32
	minor    uint32

	children map[string]entry // of a directory
	parent   *node            // of a directory; the root's is itself
	depth    int

	ino        uint32 // 0 until planned
	xattrBlock int64
	tree       extentTree
}

// entry is a name: it is the names that a layer brings, not the inodes.
type entry struct {
	n     *node
	layer int
}

func (n *node) isDir() bool { return n.mode&modeType == modeDir }

func (n *node) names() []string { return slices.Sorted(maps.Keys(n.children)) }

// split takes a name apart. Absolute names are taken as relative to the root,
// as every unpacker does; ".." has no honest use.
func split(name string) ([]string, error) {
	if len(name) > maxPathLen {
		return nil, fmt.Errorf("%w: %.64q…", ErrName, name)
	}
	var parts []string
	for p := range strings.SplitSeq(name, "/") {
		switch {
		case p == "" || p == ".":
		case p == "..":
			return nil, fmt.Errorf("%w: %q", ErrEscape, name)
		case len(p) > maxNameLen || strings.IndexByte(p, 0) >= 0:
			return nil, fmt.Errorf("%w: %.64q…", ErrName, p)
		default:
			parts = append(parts, p)
		}
	}
	return parts, nil
}

// dir finds the directory that parts lead to from the root, following
// symbolic links inside the tree as a process with this root would. With create
// it makes what is missing, mode 0755 and the root's.
func (w *Writer) dir(parts []string, create bool) (*node, error) {
	cur, hops := w.root, 0
	for todo := slices.Clone(parts); len(todo) > 0; {
		name := todo[0]
		todo = todo[1:]
		switch name {
		case "", ".":
			continue
		case "..": // only a link's target can hold it
			cur = cur.parent
			continue
		}
		e, ok := cur.children[name]
		switch {
		case !ok && !create:
			return nil, ErrNotFound
		case !ok:
			if len(name) > maxNameLen { // again only from a link's target
				return nil, ErrName
			}
			n := &node{mode: modeDir | 0o755}
			if err := w.attach(cur, name, n); err != nil {
				return nil, err
			}
			cur = n
		case e.n.isDir():
			cur = e.n
		case e.n.mode&modeType == modeSymlink:
			if hops++; hops > maxHops {
				return nil, ErrLoop
			}
			todo = append(strings.Split(e.n.target, "/"), todo...)
			if strings.HasPrefix(e.n.target, "/") {
				cur = w.root
			}
		default:
			return nil, ErrNotDir
		}
	}
	return cur, nil
}

// attach gives n the name in d. The name must be free.
func (w *Writer) attach(d *node, name string, n *node) error {
	if n.isDir() {
		if d.depth >= maxDepth {
			return ErrName
		}
		n.children, n.parent, n.depth = map[string]entry{}, d, d.depth+1
		n.links = 2
		d.links++
	} else {
		n.links++
	}
	if w.names++; w.names > w.opt.MaxFiles {
		return fmt.Errorf("%w: more than %d", ErrTooMany, w.opt.MaxFiles)
	}
	d.children[name] = entry{n, w.layer}
	return nil
}

// detach takes the name away from d and frees what nothing names any more.
func (w *Writer) detach(d *node, name string) error {
	n := d.children[name].n
	delete(d.children, name)
	w.names--
	if n.isDir() {
		d.links--
		for _, c := range n.names() { // in order: the same input gives the same disk
			if err := w.detach(n, c); err != nil {
				return err
			}
		}
		return nil
	}
	if n.links--; n.links > 0 {
		return nil
	}
	for _, x := range n.extents {
		if err := w.release(x.start, x.count); err != nil {
			return err
		}
	}
	n.extents = nil
	return nil
}

// place puts n where name says, replacing what is there. A directory over a
// directory only changes its attributes.
func (w *Writer) place(name string, n *node) error {
	parts, err := split(name)
	if err != nil {
		return err
	}
	if len(parts) == 0 {
		if !n.isDir() {
			return ErrIsRoot
		}
		w.root.copyAttr(n)
		return nil
	}
	d, err := w.dir(parts[:len(parts)-1], true)
	if err != nil {
		return fmt.Errorf("%w: %q", err, name)
	}
	last := parts[len(parts)-1]
	if old, ok := d.children[last]; ok {
		if old.n.isDir() && n.isDir() {
			old.n.copyAttr(n)
			d.children[last] = entry{old.n, w.layer}
			return nil
		}
		if old.n == n {
			return nil
		}
		if err := w.detach(d, last); err != nil {
			return err
		}
	}
	if err := w.attach(d, last, n); err != nil {
		return fmt.Errorf("%w: %q", err, name)
	}
	return nil
}

func (n *node) copyAttr(from *node) {
	n.mode, n.uid, n.gid = from.mode, from.uid, from.gid
	n.sec, n.nsec, n.xattrs = from.sec, from.nsec, from.xattrs
}

// find returns the entry that name means; a last symbolic link is not
// followed.
func (w *Writer) find(name string) (d *node, last string, n *node, err error) {
	parts, err := split(name)
	if err != nil {
		return nil, "", nil, err
	}
	if len(parts) == 0 {
		return nil, "", w.root, nil
	}
	d, err = w.dir(parts[:len(parts)-1], false)
	if err != nil {
		return nil, "", nil, fmt.Errorf("%w: %q", err, name)
	}
	last = parts[len(parts)-1]
	e, ok := d.children[last]
	if !ok {
		return nil, "", nil, fmt.Errorf("%w: %q", ErrNotFound, name)
	}
	return d, last, e.n, nil
}

// NextLayer says that what follows belongs to a further layer of the image;
// see [Writer.ClearLower].
func (w *Writer) NextLayer() { w.layer++ }

// Remove takes name and all below it out of the tree (a whiteout). A name
// that is not there is not an error, nor is the root's: it is left alone.
func (w *Writer) Remove(name string) error {
	d, last, _, err := w.find(name)
	switch {
	case errors.Is(err, ErrNotFound) || errors.Is(err, ErrNotDir):
		return nil
	case err != nil:
		return err
	case d == nil:
		return nil
	}
	return w.detach(d, last)
}

// ClearLower takes out of the directory name all that earlier layers put
// there (an opaque whiteout). What this layer has put there stays, wherever in
// the layer the whiteout stands.
func (w *Writer) ClearLower(name string) error {
	parts, err := split(name)
	if err != nil {
		return err
	}
	d, err := w.dir(parts, true)
	if err != nil {
		return fmt.Errorf("%w: %q", err, name)
	}
	_, err = w.clearLower(d)
	return err
}

// clearLower reports whether anything of this layer is left below d.
func (w *Writer) clearLower(d *node) (kept bool, err error) {
	for _, name := range d.names() {
		e := d.children[name]
		keep := e.layer == w.layer
		if e.n.isDir() {
			below, err := w.clearLower(e.n)
			if err != nil {
				return false, err
			}
			keep = keep || below
		}
		if !keep {
			if err := w.detach(d, name); err != nil {
				return false, err
			}
		}
		kept = kept || keep
	}
	return kept, nil
}
