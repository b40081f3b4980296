//go:build vm

package main

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/agentiso/agentiso/client"
)

// TestOrdinaryUser runs the product as a user whom the host does not know,
// with the directories of the XDG specification: nothing needs root, and all
// that is made is that user's.
func TestOrdinaryUser(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("missing capability: root (to become an ordinary user)")
	}
	const uid = 54321
	made := testData(t)
	home, err := os.MkdirTemp("", "agu-")
	if err != nil {
		t.Fatal(err)
	}
	h := &testHost{
		t:   t,
		dir: filepath.Join(home, ".local/share/agentiso"), run: filepath.Join(home, "run/agentiso"),
		config: filepath.Join(home, ".config/agentiso/config.toml"), log: filepath.Join(home, "log"),
		exe: filepath.Join(home, "agentiso"), agent: filepath.Join(home, agentName),
		cred: &syscall.Credential{Uid: uid, Gid: uid},
		env:  []string{"HOME=" + home, "XDG_RUNTIME_DIR=" + filepath.Join(home, "run"), "XDG_DATA_HOME=", "XDG_CONFIG_HOME=", "TMPDIR=" + home},
	}
	t.Cleanup(func() { os.RemoveAll(home) })
	t.Cleanup(h.clean)
	const script = `
		mkdir -p "$(dirname "$4")" "$1/run" "$1/.local/share/agentiso"
		chmod 700 "$1/run"
		cp "$2" "$1/agentiso"
		cp "$3" "$1/agentiso-guest"
		chmod 755 "$1/agentiso" "$1/agentiso-guest"
		printf '[vm]\naccel = "tcg"\nkernel = "lean"\n[images]\ndefault_image = "minimal"\n' >"$4"`
	agent := filepath.Join(os.Getenv("AGENTISO_TEST_BIN"), agentName)
	if out, err := exec.Command("sh", "-ec", script, "sh", home, os.Args[0], agent, h.config).CombinedOutput(); err != nil {
		t.Fatalf("make a home: %v\n%s", err, out)
	}
	h.copyDefaults(made, h.dir)
	if out, err := exec.Command("chown", "-R", fmt.Sprintf("%d:%d", uid, uid), home).CombinedOutput(); err != nil {
		t.Fatalf("make a home: %v\n%s", err, out)
	}

	c := h.start("")
	out, err := h.cli("run", "--", "sh", "-c", "id -u; echo hello > /root/x; cat /root/x").CombinedOutput()
	if err != nil || string(out) != "0\nhello\n" {
		t.Errorf("run printed %q, %v", out, err)
	}
	w := h.create(c, client.CreateOptions{Name: "box"})
	if st, err := os.Stat(fmt.Sprintf("/proc/%d", w.MachinePID)); err != nil || st.Sys().(*syscall.Stat_t).Uid != uid {
		t.Errorf("the machine runs as %+v, %v", st, err)
	}
	if st, err := os.Stat(h.socket()); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("the socket is %v, %v", st, err)
	}
	i, err := c.Info(t.Context())
	if err != nil || i.DataDir != h.dir || i.RunDir != h.run {
		t.Errorf("the daemon has %+v, %v", i, err)
	}
	// Another user may not use it.
	other := h.cli("ls")
	other.SysProcAttr.Credential = &syscall.Credential{Uid: uid + 1, Gid: uid + 1}
	other.Path = "/proc/self/exe"
	if out, err := other.CombinedOutput(); exitCode(err) != 10 || !strings.Contains(string(out), "this user may not use the agentiso daemon") {
		t.Errorf("another user was answered %s, %v", out, err)
	}
	err = filepath.WalkDir(home, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		st, err := e.Info()
		if err != nil {
			return err
		}
		if owner := st.Sys().(*syscall.Stat_t).Uid; owner != uid && path != h.log {
			t.Errorf("%s belongs to %d", path, owner)
		}
		if st.Mode().IsRegular() && strings.HasPrefix(path, h.run) && st.Mode().Perm()&0o077 != 0 {
			t.Errorf("%s has mode %v", path, st.Mode())
		}
		return nil
	})
	if err != nil {
		t.Error(err)
	}
	h.destroy(c, "box")
	if left := h.left(); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
