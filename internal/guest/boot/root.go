package boot

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// mountPoint is one mount(2).
type mountPoint struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

// mount mounts m, making its directory if the image has none.
func (m mountPoint) mount() error {
	if err := os.Mkdir(m.target, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("mount %s: %w", m.target, err)
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s: %w", m.target, err)
	}
	return nil
}

// switchRoot mounts the root disk and makes it the root of this process.
//
// The kernel's file systems are let go of here and mounted afresh on the new
// root by populate, rather than moved: a move would need paths on the disk to
// be walked while the initramfs is still the root, and a symbolic link there
// could lead back into it.
func (s *System) switchRoot() error {
	// noatime: a read must not cost the workspace's overlay a write.
	// noinit_itable: nor must an idle machine write inode tables in the
	// background; ext4 copes with unwritten ones for ever.
	err := unix.Mount(rootDevice, newRoot, rootFSType, unix.MS_NOATIME, "noinit_itable")
	if err != nil {
		return fmt.Errorf("mount root disk %s as %s: %w", rootDevice, rootFSType, explainRootError(err))
	}
	if s.initramfs, err = unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("open initramfs: %w", err)
	}
	removeTree(s.initramfs, modulesDir[1:], 0)
	for _, dir := range []string{"/proc", "/dev"} {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			return fmt.Errorf("let go of the initramfs's %s: %w", dir, err)
		}
	}
	if err := unix.Chdir(newRoot); err != nil {
		return fmt.Errorf("switch root: %w", err)
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("switch root: move mount: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("switch root: chroot: %w", err)
	}
	return unix.Chdir("/")
}

// explainRootError says what mount(2)'s errno means for a root disk.
func explainRootError(err error) error {
	switch {
	case errors.Is(err, unix.EINVAL):
		return fmt.Errorf("%w (the disk holds no ext4 file system, or a damaged one)", err)
	case errors.Is(err, unix.ENODEV):
		return fmt.Errorf("%w (this kernel has no ext4)", err)
	case errors.Is(err, unix.EUCLEAN), errors.Is(err, unix.EIO):
		return fmt.Errorf("%w (the file system is damaged)", err)
	}
	return err
}

// maxTreeDepth bounds removeTree; our own initrd is two deep.
const maxTreeDepth = 8

// removeTree removes name below the directory dirfd, as far as it can, without
// following links or entering other mounts. It gives the initramfs's memory
// back.
func removeTree(dirfd int, name string, depth int) {
	if depth > maxTreeDepth || unix.Unlinkat(dirfd, name, 0) == nil {
		return
	}
	fd, err := unix.Openat(dirfd, name, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	f := os.NewFile(uintptr(fd), name)
	names, _ := f.Readdirnames(-1)
	for _, n := range names {
		removeTree(fd, n, depth+1)
	}
	f.Close()
	_ = unix.Unlinkat(dirfd, name, unix.AT_REMOVEDIR)
}

func procFD(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
