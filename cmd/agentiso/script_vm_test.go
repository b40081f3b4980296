//go:build vm

package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// TestScriptVM runs the scripts of the vm tier: the command line against a
// daemon with real machines. Besides the usual commands they have
//
//	daemon [KEY=VALUE...]    start a daemon of the script's own, with settings
//	                         as in config print; key "empty" leaves it without
//	                         kernels and images, "tmpfs" gives it a file system
//	                         of so many MiB for its data
//	restart                  kill the daemon and start it again
//	status N CMD...          run a command, which must leave with N
//	until PATTERN CMD...     repeat a command until its output matches
//	nothing                  fail if anything of a workspace is on the host
//	fill FILE                write to FILE until the file system is full
//
// and the condition [root]. The variables DATA and RUN are the daemon's
// directories. What a script leaves in its daemon goes with it.
func TestScriptVM(t *testing.T) {
	testData(t)
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script/vm",
		Setup: func(e *testscript.Env) error {
			home := filepath.Join(e.WorkDir, "home")
			e.Setenv("HOME", home)
			e.Setenv("XDG_RUNTIME_DIR", "")
			e.Setenv("AGENTISO_CONFIG", "")
			e.Values[hostKey{}] = new(*testHost)
			return os.MkdirAll(home, 0o700)
		},
		Condition: func(cond string) (bool, error) { return cond == "root" && os.Geteuid() == 0, nil },
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"daemon": func(ts *testscript.TestScript, _ bool, args []string) { scriptDaemon(t, ts, args) },
			"restart": func(ts *testscript.TestScript, _ bool, _ []string) {
				h := scriptHost(ts)
				h.kill()
				h.start("")
			},
			"status": status, "until": until, "nothing": nothing, "fill": fill,
		},
	})
}

type hostKey struct{}

func scriptHost(ts *testscript.TestScript) *testHost { return *ts.Value(hostKey{}).(**testHost) }

// scriptTB lets a testHost belong to a script.
type scriptTB struct {
	testing.TB
	ts *testscript.TestScript
}

func (s scriptTB) Fatal(args ...any)                 { s.ts.Fatalf("%s", fmt.Sprint(args...)) }
func (s scriptTB) Fatalf(format string, args ...any) { s.ts.Fatalf(format, args...) }
func (s scriptTB) Logf(format string, args ...any)   { s.ts.Logf(format, args...) }
func (s scriptTB) Cleanup(fn func())                 { s.ts.Defer(fn) }

func scriptDaemon(t *testing.T, ts *testscript.TestScript, args []string) {
	var env []string
	var empty bool
	mib := ""
	for _, arg := range args {
		switch key, value, _ := strings.Cut(arg, "="); key {
		case "empty":
			empty = true
		case "tmpfs":
			mib = value
		default:
			env = append(env, "AGENTISO_"+strings.ToUpper(strings.ReplaceAll(key, ".", "_"))+"="+value)
		}
	}
	h := newTestHost(scriptTB{t, ts}, "")
	h.env = env
	if empty {
		text, err := os.ReadFile(h.config)
		ts.Check(err)
		ts.Check(os.WriteFile(h.config, bytes.ReplaceAll(text, []byte("kernel = \"lean\"\n"), nil), 0o600))
		for _, store := range []string{"images", "kernels"} {
			ts.Check(os.RemoveAll(filepath.Join(h.dir, store)))
		}
	}
	if mib != "" {
		h.onTmpfs(mib)
	}
	h.start("")
	*ts.Value(hostKey{}).(**testHost) = h
	ts.Setenv("AGENTISO_SOCKET", h.socket())
	ts.Setenv("DATA", h.dir)
	ts.Setenv("RUN", h.run)
}

// onTmpfs moves the data, with the default kernel and image only, to a file
// system of a size in MiB. It needs root.
func (h *testHost) onTmpfs(mib string) {
	h.t.Helper()
	whole := h.dir
	h.dir = filepath.Join(h.run, "data")
	if err := os.Mkdir(h.dir, 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := syscall.Mount("tmpfs", h.dir, "tmpfs", 0, "mode=0755,size="+mib+"m"); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		h.kill()
		if err := errors.Join(os.RemoveAll(whole), syscall.Unmount(h.dir, syscall.MNT_DETACH)); err != nil {
			h.t.Fatal(err)
		}
	})
	h.copyDefaults(whole, h.dir)
	h.env = append(h.env, "AGENTISO_SERVER_DATA_DIR="+h.dir)
}

// copyDefaults copies the default kernel and image of one data directory to
// another, holes as holes.
func (h *testHost) copyDefaults(from, to string) {
	h.t.Helper()
	const script = `
		cd "$1"
		image=$(tr : - <images/names/minimal) kernel=$(cat kernels/names/lean)
		for f in images/names/minimal "images/$image" kernels/names/lean "kernels/kernels/$kernel"; do
			mkdir -p "$2/$(dirname "$f")"
			cp -a --sparse=always "$f" "$2/$f"
		done`
	if out, err := exec.Command("sh", "-ec", script, "sh", from, to).CombinedOutput(); err != nil {
		h.t.Fatalf("copy kernel and image: %v\n%s", err, out)
	}
}

// until repeats a command until its output matches.
func until(ts *testscript.TestScript, neg bool, args []string) {
	pattern, err := regexp.Compile("(?m)" + args[0])
	ts.Check(err)
	var out []byte
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		cmd := exec.Command(args[1], args[2:]...)
		for _, v := range []string{"PATH", "HOME", "AGENTISO_SOCKET"} {
			cmd.Env = append(cmd.Env, v+"="+ts.Getenv(v))
		}
		out, _ = cmd.CombinedOutput()
		if pattern.Match(out) != neg {
			return
		}
	}
	ts.Fatalf("%v did not come to print %s within a minute, but\n%s", args[1:], args[0], out)
}

func nothing(ts *testscript.TestScript, _ bool, _ []string) {
	if left := scriptHost(ts).left(); len(left) > 0 {
		ts.Fatalf("left behind: %v", left)
	}
}

// fill leaves no room on the file system of a file.
func fill(ts *testscript.TestScript, _ bool, args []string) {
	f, err := os.Create(ts.MkAbs(args[0]))
	ts.Check(err)
	defer f.Close()
	for size := 1 << 20; size >= 512; {
		switch _, err := f.Write(bytes.Repeat([]byte{1}, size)); {
		case errors.Is(err, syscall.ENOSPC):
			size /= 2
		default:
			ts.Check(err)
		}
	}
}
