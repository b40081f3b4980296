package identity

import (
	"errors"
	"fmt"
	"os"
	"path"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ext4ResizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64): the file system's
// new number of blocks. It needs CAP_SYS_RESOURCE.
const ext4ResizeFS = 0x40086610

// growToDevice grows the ext4 file system at dir, online, to its block device
// and returns its size in bytes. A file system that fills its device is left as
// it is.
func growToDevice(dir string) (int64, error) {
	fd, err := unix.Open(dir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", dir, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	var fs unix.Statfs_t
	if err := errors.Join(unix.Fstat(fd, &st), unix.Fstatfs(fd, &fs)); err != nil {
		return 0, fmt.Errorf("stat %s: %w", dir, err)
	}
	if fs.Type != unix.EXT4_SUPER_MAGIC || fs.Bsize <= 0 {
		return 0, fmt.Errorf("grow %s: %w: its file system is not ext4", dir, errUnsuitable)
	}
	device, err := deviceSize(st.Dev)
	if err != nil {
		return 0, fmt.Errorf("grow %s: %w", dir, err)
	}
	blocks := uint64(device) / uint64(fs.Bsize)
	// The kernel does nothing if that is the number of blocks already.
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), ext4ResizeFS, uintptr(unsafe.Pointer(&blocks))); e != 0 {
		return 0, fmt.Errorf("grow %s to %d blocks of %d bytes: %w", dir, blocks, fs.Bsize, e)
	}
	return int64(blocks) * fs.Bsize, nil
}

// deviceSize returns the size in bytes of the block device number dev. Its name
// is looked up in /sys, and what /dev has under that name is checked to be it.
func deviceSize(dev uint64) (int64, error) {
	link, err := os.Readlink(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(dev), unix.Minor(dev)))
	if err != nil {
		return 0, fmt.Errorf("find block device %d:%d: %w", unix.Major(dev), unix.Minor(dev), err)
	}
	name := "/dev/" + path.Base(link)
	fd, err := unix.Open(name, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK|unix.O_NOFOLLOW, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w", name, err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat %s: %w", name, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK || st.Rdev != dev {
		return 0, fmt.Errorf("%s is not the root's device %d:%d", name, unix.Major(dev), unix.Minor(dev))
	}
	var size uint64
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKGETSIZE64, uintptr(unsafe.Pointer(&size))); e != 0 {
		return 0, fmt.Errorf("size of %s: %w", name, e)
	}
	return int64(size), nil
}
