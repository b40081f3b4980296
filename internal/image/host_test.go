//go:build host

package image

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-containerregistry/pkg/v1/empty"
	"golang.org/x/sys/unix"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

func needRoot(t *testing.T) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("missing capability: root")
	}
}

// mount mounts for the test's duration.
func mount(t *testing.T, source, target, fstype string, flags uintptr, data string) {
	t.Helper()
	if err := unix.Mount(source, target, fstype, flags, data); err != nil {
		t.Skipf("missing capability: mounting %s: %v", fstype, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(target, unix.MNT_DETACH); err != nil {
			t.Errorf("unmount %s: %v", target, err)
		}
	})
}

// loopMount mounts an image's disk read-only.
func loopMount(t *testing.T, i domain.Image) string {
	t.Helper()
	needRoot(t)
	if _, err := exec.LookPath("losetup"); err != nil {
		t.Skip("missing capability: losetup (package mount)")
	}
	out, err := exec.Command("losetup", "--read-only", "--find", "--show", i.Disk.Path).Output()
	if err != nil {
		t.Skipf("missing capability: loop devices: %v", err)
	}
	loop := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if err := exec.Command("losetup", "-d", loop).Run(); err != nil {
			t.Errorf("detach %s: %v", loop, err)
		}
	})
	dir := t.TempDir()
	mount(t, loop, dir, "ext4", unix.MS_RDONLY, "")
	return dir
}

// TestPulledImageMounted looks at a pulled image with the kernel's eyes.
func TestPulledImageMounted(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	s := open(t, Options{})
	i, err := s.Pull(t.Context(), domain.PullOptions{Reference: r.push(t, "x", ociSample(t))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	root := loopMount(t, i)
	stat := func(name string) (st unix.Stat_t) {
		if err := unix.Lstat(filepath.Join(root, name), &st); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		return st
	}
	if st := stat("bin/su"); st.Mode != unix.S_IFREG|0o4755 || st.Nlink != 2 || st.Ino != stat("bin/su2").Ino || st.Mtim.Sec != stamp.Unix() {
		t.Errorf("su is %+v", st)
	}
	if st := stat("tmp"); st.Mode != unix.S_IFDIR|0o1777 {
		t.Errorf("tmp is %o", st.Mode)
	}
	if st := stat("etc/owned"); st.Uid != 1000 || st.Gid != 1000 {
		t.Errorf("owned by %d:%d", st.Uid, st.Gid)
	}
	if target, err := os.Readlink(filepath.Join(root, "lib")); target != "usr/lib" {
		t.Errorf("lib leads to %q (%v)", target, err)
	}
	buf := make([]byte, 64)
	for name, want := range map[string]string{"user.note": "hello", "security.capability": sample[3].pax["SCHILY.xattr.security.capability"]} {
		n, err := unix.Lgetxattr(filepath.Join(root, "bin/ping"), name, buf)
		if err != nil || string(buf[:n]) != want {
			t.Errorf("%s is %q (%v)", name, buf[:max(n, 0)], err)
		}
	}
	if _, err := os.Lstat(filepath.Join(root, "gone")); !os.IsNotExist(err) {
		t.Errorf("what a whiteout removed: %v", err)
	}
}

// TestDiskFull makes images where there is no room for them.
func TestDiskFull(t *testing.T) {
	needRoot(t)
	r := newRegistry(t)
	big := makeTar(t, tarEntry{name: "big", body: strings.Repeat("0123456789abcdef", 1<<20)})
	ref := r.push(t, "big", withLayers(t, empty.Image, big))
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "tmpfs", 0, "size=12m")
	s := open(t, Options{Dir: dir})
	small := importTar(t, s, "small", tarEntry{name: "a", body: "a"})

	_, err := s.Import(t.Context(), "x", bytes.NewReader(big), nil)
	wantFault(t, err, fault.NoSpace, dir)
	_, err = s.Pull(t.Context(), domain.PullOptions{Reference: ref}, nil)
	wantFault(t, err, fault.NoSpace, dir)
	nothingLeft(t, s, small.Digest)
	if _, err := s.Image(t.Context(), "small"); err != nil {
		t.Errorf("the image that was there: %v", err)
	}
}

// TestRefusesToRemoveMounts: whatever a killed bootstrap leaves mounted, the
// host's files below it stay.
func TestRefusesToRemoveMounts(t *testing.T) {
	needRoot(t)
	s := open(t, Options{})
	precious := t.TempDir()
	if err := os.WriteFile(filepath.Join(precious, "file"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tmp := filepath.Join(s.o.Dir, "tmp-with mount")
	below := filepath.Join(tmp, "root", "dev")
	if err := os.MkdirAll(below, 0o755); err != nil {
		t.Fatal(err)
	}
	mount(t, precious, below, "", unix.MS_BIND, "")
	if err := removeTree(tmp); err == nil {
		t.Error("removed a directory with a mount below it")
	}
	if _, err := os.Stat(filepath.Join(precious, "file")); err != nil {
		t.Error(err)
	}
}

// asNobody runs tests of this binary as an ordinary user.
func asNobody(t *testing.T, pattern string, env ...string) {
	t.Helper()
	needRoot(t)
	nobody, err := user.Lookup("nobody")
	if err != nil {
		t.Skip("missing capability: the user nobody")
	}
	uid, err := strconv.ParseUint(nobody.Uid, 10, 32)
	if err != nil {
		t.Fatal(err)
	}
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	// A directory that the user can get to: the test's own are closed to it.
	dir, err := os.MkdirTemp("/var/tmp", "agentiso-image-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeTree(dir); err != nil {
			t.Error(err)
		}
	})
	tmp, program := filepath.Join(dir, "tmp"), filepath.Join(dir, "image.test")
	for _, err := range []error{
		os.Chmod(dir, 0o755), os.WriteFile(program, self, 0o755), os.Mkdir(tmp, 0o755), os.Chown(tmp, int(uid), int(uid)),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	cmd := exec.CommandContext(context.Background(), program, "-test.run", pattern, "-test.v")
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
	cmd.Env = append(append(os.Environ(), "TMPDIR="+tmp, "HOME="+tmp), env...)
	cmd.Dir = tmp
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("as nobody: %v\n%s", err, out)
	}
	if !strings.Contains(string(out), "--- PASS") || strings.Contains(string(out), "--- SKIP") {
		t.Errorf("as nobody:\n%s", out)
	}
}

func TestAsOrdinaryUser(t *testing.T) {
	asNobody(t, `^(TestPull|TestImportFormats|TestImportImageArchives|TestBuildMinimal|TestNamesAndRemoval|TestOpenSweeps)$`)
}

// bootstrapEnv lets TestBootstrapHere run in the child that asNobody starts.
const bootstrapEnv = "AGENTISO_TEST_IMAGE_BOOTSTRAP"

func TestBootstrapAsRoot(t *testing.T) {
	needRoot(t)
	testBootstrap(t)
}

func TestBootstrapAsOrdinaryUser(t *testing.T) {
	needRoot(t)
	if _, err := exec.LookPath("fakechroot"); err != nil {
		if _, err := exec.LookPath("newuidmap"); err != nil {
			t.Skip("missing capability: an ordinary user's bootstrap (package uidmap, or fakechroot and fakeroot)")
		}
	}
	asNobody(t, "^TestBootstrapHere$", bootstrapEnv+"=1")
}

func TestBootstrapHere(t *testing.T) {
	if os.Getenv(bootstrapEnv) == "" {
		t.Skip("runs as a child of TestBootstrapAsOrdinaryUser")
	}
	testBootstrap(t)
}

// testBootstrap makes the smallest root that has a user.
func testBootstrap(t *testing.T) {
	if _, err := exec.LookPath(bootstrapper); err != nil {
		t.Skip("missing capability: mmdebstrap")
	}
	s := open(t, Options{})
	r := recipe{Packages: []string{"sudo"}, Config: userConfig, Files: append(hostFiles[:len(hostFiles):len(hostFiles)], sudoFile),
		Extras: map[string]string{"etc/debian_version": "version"}}
	m, err := s.build(t.Context(), "test", r, false, func(p domain.Progress) { t.Log(p.Stage, p.Done, p.Total, p.Log) })
	if fault.Is(err, fault.Unavailable) {
		t.Skipf("missing capability: the distribution's package archives: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	i, err := s.named("test", m)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, i)
	for file, want := range map[string]string{
		"/usr/bin/sudo": "Mode:  04755", "/home/user": "User:  1000", "/etc/sudoers.d/user": "Mode:  0440", "/root": "User:     0",
	} {
		if out := debugfs(t, i, "stat "+file); !strings.Contains(out, want) {
			t.Errorf("%s: no %q in\n%s", file, want, out)
		}
	}
	if name, _ := os.Hostname(); strings.Contains(debugfs(t, i, "cat /etc/hostname"), name) {
		t.Error("the image has the host's name")
	}
	if path, err := s.Extra(t.Context(), "test", "version"); err != nil {
		t.Error(err)
	} else if b, err := os.ReadFile(path); err != nil || len(b) == 0 {
		t.Errorf("the extra file: %q %v", b, err)
	}
	nothingLeft(t, s, i.Digest)
}
