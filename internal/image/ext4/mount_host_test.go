//go:build host

package ext4

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

func run(t testing.TB, argv ...string) string {
	t.Helper()
	out, err := exec.Command(argv[0], argv[1:]...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", strings.Join(argv, " "), err, out)
	}
	return strings.TrimSpace(string(out))
}

// mount loop-mounts the file and returns where, and the loop device.
func mount(t testing.TB, path string) (dir, loop string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("missing capability: root, for loop mounts")
	}
	need(t, "losetup", "mount", "umount", "resize2fs")
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		t.Skip("missing capability: loop devices")
	}
	loop = run(t, "losetup", "--find", "--show", path)
	t.Cleanup(func() { run(t, "losetup", "-d", loop) })
	dir = t.TempDir()
	run(t, "mount", "-t", "ext4", loop, dir)
	t.Cleanup(func() { run(t, "umount", dir) })
	return dir, loop
}

// mayResize reports whether this process holds CAP_SYS_RESOURCE.
func mayResize(t testing.TB) bool {
	t.Helper()
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	must(t, unix.Capget(&hdr, &data[0]))
	return data[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0
}

// TestMounted reads through the kernel what was written, and grows the mounted
// disk where that is allowed: the kernel wants CAP_SYS_RESOURCE for it, which
// some containers lack. TestGrowInGuest always grows.
func TestMounted(t *testing.T) {
	f := disk(t)
	w := New(f, Options{})
	content := strings.Repeat("0123456789abcdef", 1<<16)
	must(t, text(w, "a/file", content, Attr{Mode: 0o640, UID: 12, GID: 70001, ModTime: day,
		Xattrs: map[string][]byte{"security.capability": {1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0}}}),
		w.Special("dev/big", BlockDevice, 259, 70000, Attr{Mode: 0o660}),
		text(w, "setuid", "x", Attr{Mode: 0o6755}))
	finish(t, w)
	dir, loop := mount(t, f.Name())

	var st unix.Stat_t
	must(t, unix.Lstat(filepath.Join(dir, "a/file"), &st))
	if st.Uid != 12 || st.Gid != 70001 || st.Mode != unix.S_IFREG|0o640 || st.Mtim.Nsec != 123456789 || st.Mtim.Sec != day.Unix() {
		t.Errorf("stat %+v", st)
	}
	var capability [64]byte
	n, err := unix.Getxattr(filepath.Join(dir, "a/file"), "security.capability", capability[:])
	if err != nil || n != 20 {
		t.Errorf("capability: %d bytes, %v", n, err)
	}
	must(t, unix.Lstat(filepath.Join(dir, "dev/big"), &st))
	if unix.Major(st.Rdev) != 259 || unix.Minor(st.Rdev) != 70000 {
		t.Errorf("device %d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	}

	if !mayResize(t) {
		t.Log("missing capability: CAP_SYS_RESOURCE, not grown")
		return
	}
	for _, size := range []int64{10 << 30, 64<<30 + 12345<<12, 1 << 40} {
		must(t, os.Truncate(f.Name(), size))
		run(t, "losetup", "-c", loop)
		run(t, "resize2fs", loop)
		var fs syscall.Statfs_t
		must(t, syscall.Statfs(dir, &fs))
		if got := int64(fs.Blocks) * fs.Bsize; got < size*9/10 {
			t.Errorf("%d of %d bytes after growing", got, size)
		}
		for i := range 200 {
			must(t, os.WriteFile(filepath.Join(dir, "a", fmt.Sprintf("%d-%d", size, i)), make([]byte, 10000), 0o600))
		}
	}
	b, err := os.ReadFile(filepath.Join(dir, "a/file"))
	if err != nil || sha256.Sum256(b) != sha256.Sum256([]byte(content)) {
		t.Errorf("file changed while growing: %v", err)
	}
	info, err := os.Stat(f.Name())
	must(t, err)
	if used := info.Sys().(*syscall.Stat_t).Blocks * 512; used > 1<<30 {
		t.Errorf("growing to 1 TiB wrote %d bytes", used)
	}
	run(t, "umount", dir)
	fsck(t, f)
	run(t, "mount", "-t", "ext4", loop, dir)
}
