package files

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/api/filesystem"
	"github.com/agentiso/agentiso/internal/guest/users"
)

// Bounds of one watch. A directory is about a kilobyte of kernel memory.
const (
	maxWatchDirs  = 16384
	maxSuppressed = 65536
)

// watchMask is what clients are told of, and what keeps the set of watched
// directories right.
const watchMask = unix.IN_CREATE | unix.IN_MODIFY | unix.IN_ATTRIB | unix.IN_DELETE |
	unix.IN_MOVED_FROM | unix.IN_MOVED_TO | unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// Why a watch has ended by itself.
var (
	errWatchGone     = errors.New("the watched directory was removed or renamed")
	errWatchOverflow = errors.New("events were lost because there were too many: watch again and list the directory")
	errWatchTooMany  = errors.New("the directory has too many subdirectories to be watched recursively")
)

// tree is the set of watched directories of one inotify instance: the mapping
// of the kernel's numbers to paths, and what to make of its events. It is used
// by one goroutine.
//
// A directory made below a recursive watch is watched from the moment that its
// event is read; what was put into it before that has had no event, and is
// reported by looking. So that nothing is reported twice, the kernel's event
// for a name found by looking is dropped once.
type tree struct {
	conn      syscall.RawConn // of the inotify descriptor: it may be closed at any time
	user      users.User
	root      string // as asked for
	recursive bool
	networks  bool // may be watched

	dirs map[int32]string // relative to root, "." for it
	wds  map[string]int32
	seen map[string]bool // names found by looking, relative to root
	dev  map[uint64]bool // file systems that may be watched
}

// event is one change; name is relative to the root.
type event struct {
	name string
	kind filesystem.EventType
}

func newTree(conn syscall.RawConn, u users.User, root string, recursive, networks bool) *tree {
	return &tree{
		conn: conn, user: u, root: root, recursive: recursive, networks: networks,
		dirs: map[int32]string{}, wds: map[string]int32{}, seen: map[string]bool{}, dev: map[uint64]bool{},
	}
}

// start watches the root and, if it is recursive, what is below.
func (t *tree) start() error {
	return t.user.Do(func() error {
		if err := mustBeDir(t.root); err != nil {
			return err
		}
		if ok, err := t.allowed(t.root); err != nil {
			return err
		} else if !ok {
			return invalidf("path '%s' is on a network file system, which does not report every change", valid(t.root))
		}
		if err := t.watch("."); err != nil {
			return err
		}
		if !t.recursive {
			return nil
		}
		return t.descend(".", nil)
	})
}

func (t *tree) path(rel string) string { return filepath.Join(t.root, rel) }

// watch adds one directory. Only the root may be reached through a link.
func (t *tree) watch(rel string) error {
	if _, ok := t.wds[rel]; ok {
		return nil
	}
	if len(t.dirs) >= maxWatchDirs {
		return errWatchTooMany
	}
	mask := uint32(watchMask)
	if rel != "." {
		mask |= unix.IN_DONT_FOLLOW
	}
	var wd int
	var err error
	if cerr := t.conn.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), t.path(rel), mask) }); cerr != nil {
		return cerr
	}
	if errors.Is(err, unix.ENOSPC) {
		return errWatchTooMany
	}
	if err != nil {
		return pathError("watch", t.path(rel), err)
	}
	if old, ok := t.dirs[int32(wd)]; ok {
		delete(t.wds, old) // the same directory under another name: it was moved
	}
	t.dirs[int32(wd)], t.wds[rel] = rel, int32(wd)
	return nil
}

// descend watches the directories below rel and, unless found is nil, reports
// everything there. Directories that cannot be read are left out.
func (t *tree) descend(rel string, found func(event)) error {
	f, err := os.Open(t.path(rel))
	if err != nil {
		if unreadable(err) {
			return nil
		}
		return err
	}
	dirs, err := t.scan(f, rel, found)
	f.Close() // before going deeper: a tree may be deeper than descriptors go
	if err != nil {
		return err
	}
	for _, dir := range dirs {
		if err := t.descend(dir, found); err != nil {
			return err
		}
	}
	return nil
}

// scan is descend for one directory; it returns those in it.
func (t *tree) scan(f *os.File, rel string, found func(event)) (dirs []string, err error) {
	for {
		list, err := f.ReadDir(1024)
		for _, e := range list {
			child := path.Join(rel, e.Name())
			if e.IsDir() {
				// Before the report: whoever hears of the directory may
				// write into it at once.
				if err := t.enter(child); err != nil {
					return nil, err
				}
				dirs = append(dirs, child)
			}
			if found != nil {
				t.look(child, e, found)
			}
		}
		if err != nil {
			if errors.Is(err, io.EOF) || unreadable(err) {
				err = nil
			}
			return dirs, err
		}
	}
}

// look reports what was found where no event can have told of it.
func (t *tree) look(rel string, e fs.DirEntry, found func(event)) {
	if len(t.seen) >= maxSuppressed {
		clear(t.seen)
	}
	t.seen[rel] = true
	found(event{rel, filesystem.EventType_EVENT_TYPE_CREATE})
	if !e.Type().IsRegular() {
		return
	}
	if fi, err := e.Info(); err == nil && fi.Size() > 0 {
		found(event{rel, filesystem.EventType_EVENT_TYPE_WRITE})
	}
}

// enter watches a directory below the root if that may be.
func (t *tree) enter(rel string) error {
	if ok, err := t.allowed(t.path(rel)); err != nil || !ok {
		return nil
	}
	if err := t.watch(rel); err != nil && !unreadable(err) {
		return err
	}
	return nil
}

// handle makes events of one of the kernel's. An error ends the watch.
func (t *tree) handle(wd int32, mask uint32, name string, emit func(event)) error {
	if mask&unix.IN_Q_OVERFLOW != 0 {
		return errWatchOverflow
	}
	dir, ok := t.dirs[wd]
	if !ok {
		return nil // of a directory given up meanwhile
	}
	if mask&unix.IN_IGNORED != 0 {
		delete(t.dirs, wd)
		if t.wds[dir] == wd {
			delete(t.wds, dir)
		}
		return nil
	}
	if name == "" {
		return t.handleSelf(dir, mask, emit)
	}
	rel := path.Join(dir, name)
	isDir := mask&unix.IN_ISDIR != 0
	switch {
	case mask&(unix.IN_CREATE|unix.IN_MOVED_TO) != 0:
		return t.handleNew(rel, isDir, mask&unix.IN_CREATE != 0, emit)
	case mask&(unix.IN_DELETE|unix.IN_MOVED_FROM) != 0:
		delete(t.seen, rel)
		if isDir {
			t.leave(rel)
		}
		kind := filesystem.EventType_EVENT_TYPE_REMOVE
		if mask&unix.IN_MOVED_FROM != 0 {
			kind = filesystem.EventType_EVENT_TYPE_RENAME
		}
		emit(event{rel, kind})
	case mask&unix.IN_MODIFY != 0:
		emit(event{rel, filesystem.EventType_EVENT_TYPE_WRITE})
	case mask&unix.IN_ATTRIB != 0:
		emit(event{rel, filesystem.EventType_EVENT_TYPE_CHMOD})
	}
	return nil
}

// handleSelf is for events of a watched directory itself. For all but the root
// the directory above has the event too.
func (t *tree) handleSelf(dir string, mask uint32, emit func(event)) error {
	if dir != "." {
		return nil
	}
	switch {
	case mask&(unix.IN_DELETE_SELF|unix.IN_UNMOUNT) != 0:
		emit(event{".", filesystem.EventType_EVENT_TYPE_REMOVE})
		return errWatchGone
	case mask&unix.IN_MOVE_SELF != 0:
		emit(event{".", filesystem.EventType_EVENT_TYPE_RENAME})
		return errWatchGone
	case mask&unix.IN_ATTRIB != 0:
		emit(event{".", filesystem.EventType_EVENT_TYPE_CHMOD})
	}
	return nil
}

func (t *tree) handleNew(rel string, isDir, created bool, emit func(event)) error {
	if created && t.seen[rel] {
		// Found by looking, and if it is a directory, looked into.
		delete(t.seen, rel)
		return nil
	}
	create := event{rel, filesystem.EventType_EVENT_TYPE_CREATE}
	if !isDir || !t.recursive {
		emit(create)
		return nil
	}
	return t.user.Do(func() error {
		if err := t.enter(rel); err != nil {
			return err
		}
		emit(create)
		if !created {
			// It came with its contents, which are nobody's change.
			return t.descend(rel, nil)
		}
		return t.descend(rel, emit)
	})
}

// leave gives up a directory that is no longer below the root, and all below.
func (t *tree) leave(rel string) {
	for dir, wd := range t.wds {
		if dir == rel || strings.HasPrefix(dir, rel+"/") {
			// An error says that the kernel has dropped it already.
			_ = t.conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
			delete(t.wds, dir)
			delete(t.dirs, wd)
		}
	}
	for name := range t.seen {
		if strings.HasPrefix(name, rel+"/") {
			delete(t.seen, name)
		}
	}
}

// parse calls fn for each record of b; see inotify(7). The kernel hands over
// whole records.
func parse(b []byte, fn func(wd int32, mask uint32, name string) error) error {
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(b))
		mask := binary.NativeEndian.Uint32(b[4:])
		size := uint64(binary.NativeEndian.Uint32(b[12:]))
		b = b[unix.SizeofInotifyEvent:]
		if size > uint64(len(b)) {
			return errors.New("inotify record is cut off")
		}
		name, _, _ := strings.Cut(string(b[:size]), "\x00")
		b = b[size:]
		if err := fn(wd, mask, name); err != nil {
			return err
		}
	}
	return nil
}

// networkFS are file systems on which others change files without this kernel
// knowing; the numbers are those of statfs(2).
var networkFS = map[uint32]bool{
	0x6969:     true, // NFS
	0xff534d42: true, // CIFS
	0xfe534d42: true, // SMB2
	0x517b:     true, // SMB
	0x01021997: true, // 9p
	0x65735546: true, // FUSE, most of which are remote
	0x00c36400: true, // Ceph
	0x5346414f: true, // AFS
	0x6b414653: true, // kAFS
	0x73757245: true, // Coda
	0x564c:     true, // NCP
	0x7461636f: true, // OCFS2
	0x01161970: true, // GFS2
	0x0bd00bd0: true, // Lustre
	0x47504653: true, // GPFS
}

// allowed says whether p is on a file system that may be watched. The answer
// for a file system is remembered by its device number.
func (t *tree) allowed(p string) (bool, error) {
	if t.networks {
		return true, nil
	}
	var st unix.Stat_t
	if err := unix.Stat(p, &st); err != nil {
		return false, pathError("stat", p, err)
	}
	if ok, known := t.dev[st.Dev]; known {
		return ok, nil
	}
	var f unix.Statfs_t
	if err := unix.Statfs(p, &f); err != nil {
		return false, pathError("statfs", p, err)
	}
	ok := !networkFS[uint32(f.Type)]
	t.dev[st.Dev] = ok
	return ok, nil
}

// lookAt describes what an event is about, or nothing if that has gone.
func (t *tree) lookAt(rel string, names *users.Names) (e *filesystem.EntryInfo) {
	err := t.user.Do(func() (err error) {
		e, err = entryAt(t.path(rel), names)
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return e
}
