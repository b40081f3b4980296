package image

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/fault"
)

var update = flag.Bool("update", false, "write golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-want +got):\n%s", name, diff)
	}
}

func TestBuildMinimal(t *testing.T) {
	more := func() ([]File, error) {
		return []File{{Path: "etc/extra", Data: []byte("extra"), Mode: 0o600}, {Path: "etc/link", Target: "extra"}}, nil
	}
	s := open(t, Options{RecipeFiles: map[string]func() ([]File, error){recipeMinimal: more}})
	if _, err := s.busybox(t.Context(), t.TempDir()+"/none/none"); err != nil {
		t.Skip("missing capability: a static busybox (package busybox-static)")
	}
	i, err := s.Build(t.Context(), recipeMinimal, "", false, nil)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, i)
	if i.User != "root" || i.Workdir != "/root" || !slices.Equal(i.Names, []string{"minimal"}) {
		t.Errorf("image is %+v", i)
	}
	for file, want := range map[string]string{
		"/bin/sh": `dest: "/bin/busybox"`, "/bin/busybox": "Mode:  0755", "/home/user": "User:  1000",
		"/tmp": "Mode:  01777", "/etc/shadow": "Mode:  0600", "/etc/extra": "Mode:  0600", "/etc/link": `dest: "extra"`,
	} {
		if out := debugfs(t, i, "stat "+file); !strings.Contains(out, want) {
			t.Errorf("%s: no %q in\n%s", file, want, out)
		}
	}
	again, err := s.Build(t.Context(), recipeMinimal, "other", false, func(p domain.Progress) { t.Errorf("built again: %+v", p) })
	if err != nil || again.Digest != i.Digest {
		t.Errorf("again: %s %v", again.Digest, err)
	}
	forced, err := s.Build(t.Context(), recipeMinimal, "", true, nil)
	if err != nil || forced.Digest != i.Digest {
		t.Errorf("the same files give %s and %s (%v)", i.Digest, forced.Digest, err)
	}
	nothingLeft(t, s, i.Digest)
}

func TestBuildRefuses(t *testing.T) {
	text := filepath.Join(t.TempDir(), "busybox")
	if err := os.WriteFile(text, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	s := open(t, Options{Busybox: text})
	_, err := s.Build(t.Context(), "nonsense", "", false, nil)
	wantFault(t, err, fault.Invalid, "no recipe")
	if strings.Contains(fault.As(err).Next, recipeStock) {
		t.Error("hidden recipes are named to users")
	}
	_, err = s.Build(t.Context(), recipeMinimal, "a//b", false, nil)
	wantFault(t, err, fault.Invalid, "name")
	_, err = s.Build(t.Context(), recipeMinimal, "", false, nil)
	wantFault(t, err, fault.Invalid, "statically")
	_, err = s.Image(t.Context(), "dev")
	if wantFault(t, err, fault.NotFound); !strings.Contains(fault.As(err).Next, "image build dev") {
		t.Errorf("next is %q", fault.As(err).Next)
	}
	t.Setenv("PATH", t.TempDir())
	_, err = s.Build(t.Context(), recipeDev, "", false, nil)
	wantFault(t, err, fault.Missing, "mmdebstrap")
	nothingLeft(t, s)
}

// TestBootstrapModes stands programs in for those of the host.
func TestBootstrapModes(t *testing.T) {
	for _, tc := range []struct {
		name     string
		uid      int
		programs map[string]string
		mode     string
		says     string
	}{
		{"root", 0, nil, "root", ""},
		{"user namespace", 1000, map[string]string{bootstrapper: "exit 0"}, "unshare", ""},
		{"no namespace", 1000, map[string]string{bootstrapper: "exit 1", "fakechroot": "", "fakeroot": ""}, "fakechroot", ""},
		{"nothing", 1000, map[string]string{bootstrapper: "echo no subuid >&2; exit 1", "fakeroot": ""}, "", "fakechroot is not installed"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			bin := t.TempDir()
			for name, body := range tc.programs {
				if err := os.WriteFile(filepath.Join(bin, name), []byte("#!/bin/sh\n"+body+"\n"), 0o755); err != nil {
					t.Fatal(err)
				}
			}
			t.Setenv("PATH", bin)
			mode, err := bootstrapMode(t.Context(), tc.uid)
			if mode != tc.mode {
				t.Errorf("mode is %q (%v), want %q", mode, err, tc.mode)
			}
			if tc.says != "" {
				wantFault(t, err, fault.Missing, tc.says, "no subuid")
			}
		})
	}
}

func TestBootstrapArgs(t *testing.T) {
	var b strings.Builder
	for _, name := range []string{recipeDev, recipeStock} {
		for _, d := range []distro{{"debian", "bookworm"}, {"ubuntu", "noble"}} {
			for _, arg := range bootstrapArgs(recipes[name], d, "root") {
				b.WriteString(arg + "\n")
			}
			b.WriteString("\n")
		}
	}
	golden(t, "bootstrap.args", b.String())
}

func TestRecipeDigests(t *testing.T) {
	seen := map[string]string{}
	d := distro{"debian", "bookworm"}
	for name, r := range recipes {
		seen[r.digest(d, "mmdebstrap 1.3.5")] = name
	}
	dev := recipes[recipeDev]
	seen[dev.digest(distro{"debian", "trixie"}, "mmdebstrap 1.3.5")] = "suite"
	seen[dev.digest(d, "mmdebstrap 1.5.0")] = "tool"
	dev.Files = append(slices.Clone(dev.Files), File{Path: "x"})
	seen[dev.digest(d, "mmdebstrap 1.3.5")] = "files"
	if len(seen) != len(recipes)+3 {
		t.Errorf("recipes share digests: %v", seen)
	}
}

func TestBootstrapProgress(t *testing.T) {
	log, err := os.Open(filepath.Join("testdata", "mmdebstrap.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	var b strings.Builder
	var last domain.Progress
	l := &bootstrapLog{progress: func(p domain.Progress) {
		if p.Log == "" || p.Done < 0 || p.Done > p.Total {
			t.Errorf("progress %+v", p)
		}
		p.Log = ""
		if p != last {
			b.WriteString(strings.TrimSpace(strings.Join([]string{p.Stage, fmtProgress(p)}, " ")) + "\n")
		}
		last = p
	}}
	if _, err := io.CopyBuffer(struct{ io.Writer }{l}, struct{ io.Reader }{log}, make([]byte, 100)); err != nil {
		t.Fatal(err)
	}
	golden(t, "mmdebstrap.progress", b.String())
	if _, err := l.Write([]byte(strings.Repeat("x", 1<<20))); err != nil || len(l.partial) > maxLogLine {
		t.Errorf("an endless line is kept: %d bytes (%v)", len(l.partial), err)
	}
}

func fmtProgress(p domain.Progress) string {
	if p.Total == 0 {
		return ""
	}
	return string(rune('0'+p.Done/10)) + string(rune('0'+p.Done%10)) + "/" + string(rune('0'+p.Total/10)) + string(rune('0'+p.Total%10))
}

func script(t *testing.T, body string) []string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+body), 0o755); err != nil {
		t.Fatal(err)
	}
	return []string{path}
}

func TestRunBootstrap(t *testing.T) {
	good := filepath.Join(t.TempDir(), "good.tar")
	if err := os.WriteFile(good, makeTar(t, sample...), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		script string
		kind   fault.Kind // "" is success
		says   string
	}{
		{"good", "cat >&2; cat " + good, "", ""},
		{"fails at once", "echo 'E: Unable to locate package nonsense' >&2; exit 1", fault.Unsupported, "nonsense"},
		{"fails halfway", "head -c 2000 " + good + "; echo 'E: Failed to fetch http://x' >&2; exit 100", fault.Unavailable, "Failed to fetch"},
		{"fails at the end", "cat " + good + "; echo 'it broke' >&2; exit 3", fault.Internal, "it broke"},
		{"disk full", "echo 'E: write: No space left on device' >&2; exit 3", fault.NoSpace, "No space"},
		{"cut short without a word", "head -c 2000 " + good, fault.Invalid, "cut short"},
		{"not a tar", "yes", fault.Invalid, "damaged"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			s := open(t, Options{})
			st, err := s.stage()
			if err != nil {
				t.Fatal(err)
			}
			u := s.unpacker(st, "", nil)
			log := &bootstrapLog{}
			err = runBootstrap(t.Context(), script(t, tc.script), t.TempDir(), strings.NewReader("deb x\n"), log, func(r io.Reader) error {
				return u.apply(t.Context(), r, false)
			})
			err = errors.Join(err, st.discard())
			nothingLeft(t, s)
			if tc.kind == "" {
				if err != nil || !slices.Contains(log.lines, "deb x") {
					t.Errorf("%v, log %q", err, log.lines)
				}
				return
			}
			wantFault(t, s.explain("build", err), tc.kind, tc.says)
		})
	}
}

// TestRunBootstrapCancelled has a process that leaves children which ignore
// being asked to stop.
func TestRunBootstrapCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	pidfile := filepath.Join(t.TempDir(), "pid")
	argv := script(t, "(trap '' TERM; echo $$ >"+pidfile+"; exec sleep 1000 >/dev/null 2>&1) &\ntrap 'exit 1' TERM\necho up >&2\nwhile :; do sleep 0.05; done\n")
	started := sync.OnceFunc(cancel)
	err := runBootstrap(ctx, argv, t.TempDir(), strings.NewReader(""), &bootstrapLog{progress: func(domain.Progress) { started() }}, func(r io.Reader) error {
		_, err := io.Copy(io.Discard, r)
		return err
	})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error is %v", err)
	}
	pid, err := os.ReadFile(pidfile)
	if errors.Is(err, os.ErrNotExist) {
		return // stopped before it got that far
	}
	// It may be a zombie until init reaps it, but it must not run.
	stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
	if err == nil && !bytes.Contains(stat, []byte(") Z ")) && bytes.Contains(stat, []byte("sleep")) {
		t.Errorf("a child outlives the bootstrap: %s", stat)
	}
}

func TestExplainNoSpace(t *testing.T) {
	s := open(t, Options{})
	err := s.explain("build image dev", &os.PathError{Op: "write", Path: "disk.ext4", Err: syscall.ENOSPC})
	wantFault(t, err, fault.NoSpace, "build image dev", s.o.Dir)
}
