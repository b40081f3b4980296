package image

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
)

// crashEnv makes a child of this test binary do one thing to a store and kill
// itself at a step of it: "import sealed /path/of/store".
const crashEnv = "AGENTISO_TEST_IMAGE_CRASH"

func TestCrashChild(t *testing.T) {
	what := strings.Fields(os.Getenv(crashEnv))
	if len(what) != 3 {
		t.Skip("runs as a child of TestCrash")
	}
	s := open(t, Options{Dir: what[2]})
	s.step = func(at string) {
		if at == what[1] {
			syscall.Kill(os.Getpid(), syscall.SIGKILL)
		}
	}
	if what[0] == "import" {
		importTar(t, s, "x", sample...)
		return
	}
	if _, _, err := s.Remove(t.Context(), "x", func(string) []string { return nil }); err != nil {
		t.Error(err)
	}
}

// TestCrash kills a process after each step of making and of removing an
// image. The next process finds the old state or the new one, clears what is
// neither, and can do the same again.
func TestCrash(t *testing.T) {
	for _, tc := range []struct {
		what, step string
		left       bool // the image, without or with its name
	}{
		{"import", "staged", false},
		{"import", "synced", false},
		{"import", "sealed", false},
		{"import", "published", true},
		{"remove", "condemned", false},
		{"remove", "unnamed", false},
	} {
		t.Run(tc.what+" "+tc.step, func(t *testing.T) {
			dir := t.TempDir()
			before := open(t, Options{Dir: dir})
			if tc.what == "remove" {
				importTar(t, before, "x", sample...)
			}
			cmd := exec.Command(os.Args[0], "-test.run", "^TestCrashChild$")
			cmd.Env = append(os.Environ(), crashEnv+"="+tc.what+" "+tc.step+" "+dir)
			out, err := cmd.CombinedOutput()
			if ee, ok := errors.AsType[*exec.ExitError](err); !ok || !ee.Sys().(syscall.WaitStatus).Signaled() {
				t.Fatalf("the child ended by itself: %v\n%s", err, out)
			}

			s := open(t, Options{Dir: dir})
			all, err := s.Images(t.Context())
			if err != nil || (len(all) == 1) != tc.left {
				t.Errorf("%d images after the crash (%v)", len(all), err)
			}
			if names, _ := os.ReadDir(s.path("names")); len(names) != 0 {
				t.Errorf("names after the crash: %v", names)
			}
			i, err := s.Import(t.Context(), "x", bytes.NewReader(makeTar(t, sample...)), nil)
			if err != nil {
				t.Fatal(err)
			}
			checkSample(t, i)
			nothingLeft(t, s, i.Digest)
		})
	}
}
