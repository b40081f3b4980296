//go:build vm

package ext4

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// kernel finds a guest kernel with ext4 and virtio built in, which boots
// without ACPI.
func kernel(t *testing.T) string {
	t.Helper()
	if path := os.Getenv("AGENTISO_TEST_VMLINUX"); path != "" {
		return path
	}
	names, _ := filepath.Glob(filepath.Join(os.Getenv("AGENTISO_TEST_DATA"), "*", "names", "lean"))
	for _, name := range names { // the kernel store's layout
		content, err := os.ReadFile(name)
		must(t, err)
		return filepath.Join(filepath.Dir(filepath.Dir(name)), "kernels", strings.TrimSpace(string(content)), "vmlinux")
	}
	t.Skip("missing capability: the lean guest kernel (AGENTISO_TEST_DATA or AGENTISO_TEST_VMLINUX)")
	return ""
}

// cpio writes a newc archive of one program and the directories it mounts on.
func cpio(t *testing.T, program string) string {
	t.Helper()
	body, err := os.ReadFile(program)
	must(t, err)
	var b bytes.Buffer
	ino := 0
	add := func(name string, mode int, data []byte) {
		ino++
		fmt.Fprintf(&b, "070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
			ino, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name)+1, 0, name)
		b.Write(make([]byte, -b.Len()&3))
		b.Write(data)
		b.Write(make([]byte, -b.Len()&3))
	}
	add("dev", modeDir|0o755, nil)
	add("mnt", modeDir|0o755, nil)
	add("init", modeRegular|0o755, body)
	add("TRAILER!!!", 0, nil)
	out := filepath.Join(t.TempDir(), "initrd")
	must(t, os.WriteFile(out, b.Bytes(), 0o600))
	return out
}

// TestGrowInGuest grows a mounted disk in a real guest: to 10 GiB, to a size
// that is no whole number of groups, to 1 TiB, and beyond the 2 TiB that the
// reserved descriptors reach.
func TestGrowInGuest(t *testing.T) {
	need(t, "qemu-system-x86_64", "e2fsck")
	vmlinux := kernel(t)
	program := filepath.Join(t.TempDir(), "init")
	build := exec.Command("go", "build", "-o", program, "./testdata/growinit")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build init: %v\n%s", err, out)
	}
	initrd := cpio(t, program)

	f := disk(t)
	w := New(f, Options{})
	must(t, text(w, "a/file", strings.Repeat("0123456789abcdef", 1<<16), Attr{Mode: 0o600}))
	finish(t, w)
	for _, size := range []int64{10 << 30, 64<<30 + 12345<<12, 1 << 40, 3 << 40} {
		must(t, os.Truncate(f.Name(), size))
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		out, err := exec.CommandContext(ctx, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
			"-M", "microvm,x-option-roms=off,isa-serial=on,acpi=off,rtc=on,pit=on,pic=on", "-accel", "tcg", "-cpu", "max",
			"-smp", "1", "-m", "256", "-kernel", vmlinux, "-initrd", initrd, "-append", "console=ttyS0 reboot=t panic=-1 no_timer_check quiet",
			"-serial", "stdio", "-drive", "if=none,id=d,format=raw,file="+f.Name(), "-device", "virtio-blk-device,drive=d").CombinedOutput()
		cancel()
		_, ok, found := strings.Cut(string(out), "GROW-OK ")
		if !found {
			t.Fatalf("grow to %d: %v\n%s", size, err, out)
		}
		var got int64
		if _, err := fmt.Sscan(ok, &got); err != nil || got < size*9/10 {
			t.Errorf("%d of %d bytes after growing (%v)", got, size, err)
		}
		if size <= 64<<30 { // e2fsck of more takes minutes
			fsck(t, f)
		}
		info, err := os.Stat(f.Name())
		must(t, err)
		t.Logf("%d GiB: the guest wrote %d MiB", size>>30, info.Sys().(*syscall.Stat_t).Blocks>>11)
	}
}
