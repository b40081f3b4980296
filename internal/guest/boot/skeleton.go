package boot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// The caps on a skeleton: a hostile image gets a short one, not a slow boot.
const (
	maxSkeleton      = 256
	maxSkeletonDepth = 6
)

// node is a directory (target empty) or a symbolic link.
type node struct {
	path     string // relative to the skeleton's root
	mode     uint32
	uid, gid int
	target   string
}

// errEnough ends a walk that has found maxSkeleton nodes.
var errEnough = errors.New("enough")

// readSkeleton lists the directories and links below root, parents first. What
// it cannot read it leaves out.
func readSkeleton(root string) []node {
	var nodes []node
	_ = filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil // left out; the walk goes on beside it
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err
		}
		if len(nodes) == maxSkeleton {
			return errEnough
		}
		var st unix.Stat_t
		if unix.Lstat(path, &st) != nil {
			return nil
		}
		n := node{path: rel, mode: st.Mode & 0o7777, uid: int(st.Uid), gid: int(st.Gid)}
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFDIR:
			nodes = append(nodes, n)
			if depth(rel) >= maxSkeletonDepth {
				return fs.SkipDir
			}
		case unix.S_IFLNK:
			if n.target, err = os.Readlink(path); err == nil {
				nodes = append(nodes, n)
			}
		}
		return nil
	})
	return nodes
}

// writeSkeleton makes nodes below root, which is empty.
func writeSkeleton(root string, nodes []node) error {
	var errs []error
	for _, n := range nodes {
		path := filepath.Join(root, n.path)
		if n.target != "" {
			errs = append(errs, os.Symlink(n.target, path), os.Lchown(path, n.uid, n.gid))
			continue
		}
		// The mode comes last: chown drops set-id bits.
		errs = append(errs, os.Mkdir(path, 0o700), os.Lchown(path, n.uid, n.gid), unix.Chmod(path, n.mode))
	}
	return errors.Join(errs...)
}

func depth(rel string) int {
	n := 1
	for _, r := range rel {
		if r == filepath.Separator {
			n++
		}
	}
	return n
}
