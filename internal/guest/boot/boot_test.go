package boot

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestParseCmdline(t *testing.T) {
	tests := []struct {
		text string
		want Cmdline
		err  string
	}{
		{"", Cmdline{Fast, Serial}, ""},
		{"console=ttyS0 quiet\n", Cmdline{Fast, Serial}, ""},
		{"agentiso.init=image agentiso.link=vsock", Cmdline{Image, Vsock}, ""},
		{"agentiso.init=fast agentiso.init=image", Cmdline{Image, Serial}, ""},
		{`dyndbg="file a.c +p agentiso.init=image" agentiso.link=vsock`, Cmdline{Fast, Vsock}, ""},
		{`"agentiso.init=image"`, Cmdline{Image, Serial}, ""},
		{"xagentiso.init=image agentiso.initial=image", Cmdline{Fast, Serial}, ""},
		{"quiet -- agentiso.init=image", Cmdline{Fast, Serial}, ""},
		{"agentiso.init=systemd", Cmdline{}, `agentiso.init="systemd": want fast or image`},
		{"agentiso.link=", Cmdline{}, `agentiso.link="": want serial or vsock`},
	}
	for _, tt := range tests {
		got, err := ParseCmdline(tt.text)
		if tt.err == "" && (err != nil || got != tt.want) {
			t.Errorf("%q: got %v, %v, want %v", tt.text, got, err, tt.want)
		}
		if tt.err != "" && (err == nil || !strings.Contains(err.Error(), tt.err)) {
			t.Errorf("%q: got error %v, want %q", tt.text, err, tt.err)
		}
	}
}

func FuzzParseCmdline(f *testing.F) {
	f.Add("agentiso.init=image agentiso.link=vsock")
	f.Add(`a="b c" "d`)
	f.Fuzz(func(t *testing.T, text string) {
		for _, w := range splitCmdline(text) {
			if strings.Contains(w, `"`) {
				t.Errorf("%q: word %q keeps a quote", text, w)
			}
		}
		if c, err := ParseCmdline(text); err == nil && (c.Init != Fast && c.Init != Image || c.Link != Serial && c.Link != Vsock) {
			t.Errorf("%q: %v", text, c)
		}
	})
}

func TestModuleList(t *testing.T) {
	got := parseModuleList("virtio.ko\n\n# note\n ../evil.ko\nvsock.ko\nvmw_vsock_virtio_transport.ko")
	if diff := cmp.Diff([]string{"virtio.ko", "vsock.ko", "vmw_vsock_virtio_transport.ko"}, got); diff != "" {
		t.Error(diff)
	}
	for _, name := range got {
		if needed(name, Serial) != !strings.Contains(name, "vsock") || !needed(name, Vsock) {
			t.Errorf("%s: serial %v, vsock %v", name, needed(name, Serial), needed(name, Vsock))
		}
	}
}

func TestModulesThatDoNotLoadArePassedOver(t *testing.T) {
	dir := t.TempDir()
	list := filepath.Join(dir, "list")
	write(t, list, "absent.ko\nbroken.ko\n")
	write(t, filepath.Join(dir, "broken.ko"), "no module")
	var out bytes.Buffer
	if err := loadModules(dir, list, Serial, NewLogger(&out, slog.LevelInfo)); err != nil {
		t.Error(err)
	}
	if n := strings.Count(out.String(), "level=WARN"); n != 2 {
		t.Errorf("%d warnings, want 2:\n%s", n, &out)
	}
	if err := loadModules(dir, filepath.Join(dir, "no list"), Serial, slog.New(slog.DiscardHandler)); err != nil {
		t.Errorf("without a list: %v", err)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestWaitDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vda")
	err := waitDevice(t.Context(), path, time.Millisecond)
	if !errors.Is(err, unix.ENOENT) || !strings.Contains(err.Error(), path) {
		t.Errorf("absent: %v", err)
	}
	write(t, path, "")
	if err := waitDevice(t.Context(), path, time.Millisecond); err == nil || !strings.Contains(err.Error(), "not a block device") {
		t.Errorf("a file: %v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := waitDevice(ctx, path, time.Hour); err == nil {
		t.Error("waited though cancelled")
	}
}

func TestSkeleton(t *testing.T) {
	from, to := t.TempDir(), t.TempDir()
	write(t, filepath.Join(from, "mysqld/mysqld.pid"), "12")
	write(t, filepath.Join(from, "lock/sub/file"), "")
	if err := unix.Chmod(filepath.Join(from, "mysqld"), 0o2770); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/run/lock", filepath.Join(from, "old")); err != nil {
		t.Fatal(err)
	}
	deep := strings.Repeat("d/", maxSkeletonDepth+3)
	if err := os.MkdirAll(filepath.Join(from, deep), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := writeSkeleton(to, readSkeleton(from)); err != nil {
		t.Fatal(err)
	}
	var got []string
	err := filepath.Walk(to, func(path string, fi os.FileInfo, err error) error {
		if err != nil || path == to {
			return err
		}
		rel, err := filepath.Rel(to, path)
		if !strings.HasPrefix(rel, "d") {
			got = append(got, fi.Mode().String()+" "+rel)
		} else if depth(rel) > maxSkeletonDepth {
			t.Errorf("too deep: %s", rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"drwxr-xr-x lock", "drwxr-xr-x lock/sub", "dgrwxrwx--- mysqld", "Lrwxrwxrwx old"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestSkeletonIsBounded(t *testing.T) {
	from := t.TempDir()
	for i := range maxSkeleton + 50 {
		if err := os.Mkdir(filepath.Join(from, fmt.Sprint(i)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if got := len(readSkeleton(from)); got != maxSkeleton {
		t.Errorf("%d nodes, want %d", got, maxSkeleton)
	}
	if got := readSkeleton(filepath.Join(from, "absent")); got != nil {
		t.Errorf("of nothing: %v", got)
	}
}

func TestSysctls(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "vm/max_map_count"), "1")
	err := writeSysctls(root, []sysctl{{"vm.max_map_count", "2"}, {"no.such.knob", "3"}})
	if err != nil {
		t.Error(err)
	}
	if got, _ := os.ReadFile(filepath.Join(root, "vm/max_map_count")); string(got) != "2" {
		t.Errorf("got %q", got)
	}
	write(t, filepath.Join(root, "vm/dir/x"), "")
	if err := writeSysctls(root, []sysctl{{"vm.dir", "1"}}); err == nil {
		t.Error("an unwritable knob is no error")
	}
}

func TestRemoveTree(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	write(t, filepath.Join(outside, "kept"), "")
	write(t, filepath.Join(dir, "modules/a/b.ko"), "")
	write(t, filepath.Join(dir, "init"), "")
	if err := os.Symlink(outside, filepath.Join(dir, "modules/link")); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	removeTree(fd, "modules", 0)
	removeTree(fd, "absent", 0)
	if _, err := os.Stat(filepath.Join(outside, "kept")); err != nil {
		t.Errorf("followed a link: %v", err)
	}
	ents, err := os.ReadDir(dir)
	if err != nil || len(ents) != 1 || ents[0].Name() != "init" {
		t.Errorf("left %v, %v", ents, err)
	}
}

func TestFindInit(t *testing.T) {
	has := func(paths ...string) func(string) bool {
		return func(p string) bool {
			for _, h := range paths {
				if p == h {
					return true
				}
			}
			return false
		}
	}
	for _, tt := range []struct {
		have []string
		want string
	}{
		{[]string{"/lib/systemd/systemd", "/sbin/init", "/bin/busybox"}, "/sbin/init"},
		{[]string{"/lib/systemd/systemd"}, "/lib/systemd/systemd"},
		{[]string{"/bin/busybox"}, "/bin/busybox init"},
	} {
		got, err := findInit(inits, has(tt.have...))
		if err != nil || strings.Join(got, " ") != tt.want {
			t.Errorf("%v: got %v, %v", tt.have, got, err)
		}
	}
	if _, err := findInit(inits, has()); err == nil || !strings.Contains(err.Error(), "no init") {
		t.Errorf("none: %v", err)
	}
	path := filepath.Join(t.TempDir(), "f")
	write(t, path, "")
	if executable(path) || executable(filepath.Dir(path)) || executable("/absent") {
		t.Error("a plain file, a directory or nothing passes for executable")
	}
}

func TestRunLevelRequest(t *testing.T) {
	b := runLevelRequest('6')
	if len(b) != 384 || !bytes.Equal(b[:12], []byte{0x69, 0x19, 0x09, 0x03, 1, 0, 0, 0, '6', 0, 0, 0}) {
		t.Errorf("% x", b[:16])
	}
}

func TestLogger(t *testing.T) {
	var out bytes.Buffer
	log := NewLogger(&out, slog.LevelInfo)
	log.Debug("unseen")
	log.Warn("mount", "err", errors.New("a\nagentiso: level=INFO msg=forged"))
	want := prefix + `level=WARN msg=mount err="a\nagentiso: level=INFO msg=forged"` + "\n"
	if out.String() != want {
		t.Errorf("got %q, want %q", &out, want)
	}
}

// TestConsoleNeverBlocks fills a console that nobody drains.
func TestConsoleNeverBlocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console")
	if err := unix.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	// Without a reader the device does not open: lines are lost.
	c := openConsole(path)
	if n, err := c.Write([]byte("lost\n")); n != 5 || err != nil {
		t.Errorf("unopened: %d, %v", n, err)
	}
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	line := bytes.Repeat([]byte("x"), 4096)
	for range 100 { // a pipe holds 16 of them
		if n, err := c.Write(line); n != len(line) || err != nil {
			t.Fatalf("full: %d, %v", n, err)
		}
	}
	buf := make([]byte, 4096)
	if n, err := r.Read(buf); n != 4096 || err != nil || !bytes.Equal(buf, line) {
		t.Errorf("read %d, %v", n, err)
	}
}
