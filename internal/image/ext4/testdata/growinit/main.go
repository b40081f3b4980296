// Growinit is the first process of the guest in which the test of this package
// grows a mounted file system: it mounts /dev/vda, checks what is on it, grows
// it to the disk's size, uses the new room and reports on the console.
package main

import (
	"bytes"
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// resizeFS is EXT4_IOC_RESIZE_FS, _IOW('f', 16, __u64).
const resizeFS = 0x40086610

func main() {
	if err := run(); err != nil {
		fmt.Println("GROW-ERROR", err)
	}
	unix.Sync()
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

func run() error {
	if err := unix.Mount("dev", "/dev", "devtmpfs", 0, ""); err != nil {
		return fmt.Errorf("mount dev: %w", err)
	}
	if err := unix.Mount("/dev/vda", "/mnt", "ext4", 0, ""); err != nil {
		return fmt.Errorf("mount disk: %w", err)
	}
	before, err := os.ReadFile("/mnt/a/file")
	if err != nil {
		return err
	}
	f, err := os.Open("/dev/vda")
	if err != nil {
		return err
	}
	defer f.Close()
	size, err := f.Seek(0, 2)
	if err != nil {
		return err
	}
	root, err := os.Open("/mnt")
	if err != nil {
		return err
	}
	blocks := uint64(size / 4096)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, root.Fd(), resizeFS, uintptr(unsafe.Pointer(&blocks))); errno != 0 {
		return fmt.Errorf("resize to %d blocks: %w", blocks, errno)
	}
	root.Close()
	for i := range 300 {
		if err := os.WriteFile(fmt.Sprintf("/mnt/a/new-%d", i), bytes.Repeat([]byte("n"), 100_000), 0o600); err != nil {
			return err
		}
	}
	after, err := os.ReadFile("/mnt/a/file")
	if err != nil || !bytes.Equal(before, after) {
		return fmt.Errorf("file changed while growing: %v", err)
	}
	var st unix.Statfs_t
	if err := unix.Statfs("/mnt", &st); err != nil {
		return err
	}
	if err := unix.Unmount("/mnt", 0); err != nil {
		return fmt.Errorf("unmount: %w", err)
	}
	fmt.Println("GROW-OK", int64(st.Blocks)*st.Bsize)
	return nil
}
