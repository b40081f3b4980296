package config

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentiso/agentiso/internal/fault"
)

func TestRunDir(t *testing.T) {
	mine := t.TempDir()
	if err := os.Chmod(mine, 0o700); err != nil {
		t.Fatal(err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o755); err != nil {
		t.Fatal(err)
	}
	me := func(env ...string) Host {
		h := host(env...)
		h.UID = os.Geteuid()
		return h
	}
	if os.Geteuid() == 0 {
		// runDir asks for root first; be another user who owns the directory.
		if err := os.Chown(mine, 1000, 1000); err != nil {
			t.Fatal(err)
		}
		if err := os.Chown(open, 1000, 1000); err != nil {
			t.Fatal(err)
		}
		me = host
	}
	stranger := me("XDG_RUNTIME_DIR=" + mine)
	stranger.UID += 7
	tests := []struct {
		name string
		host Host
		data string
		want string
	}{
		{"root", root("XDG_RUNTIME_DIR=" + mine), "/d", "/run/agentiso"},
		{"session", me("XDG_RUNTIME_DIR=" + mine), "/d", mine + "/agentiso"},
		{"no session", me(), "/d", "/d/run"},
		{"no such directory", me("XDG_RUNTIME_DIR=/nonexistent/x"), "/d", "/d/run"},
		{"not absolute", me("XDG_RUNTIME_DIR=run"), "/d", "/d/run"},
		{"open to others", me("XDG_RUNTIME_DIR=" + open), "/d", "/d/run"},
		{"another user's", stranger, "/d", "/d/run"},
		{"long data directory", host(), "/" + strings.Repeat("d", 90), "/tmp/agentiso-1000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := tt.host.runDir(tt.data); got != tt.want {
				t.Errorf("runDir = %s, want %s", got, tt.want)
			}
		})
	}
}

func TestMakeDirs(t *testing.T) {
	tests := []struct {
		name    string
		uids    bool
		prepare func(t *testing.T, data, run string)
		says    string // "" is success
		mode    os.FileMode
	}{
		{"fresh", false, func(*testing.T, string, string) {}, "", 0o700},
		{"fresh with machine users", true, func(*testing.T, string, string) {}, "", 0o711},
		{"passage is opened", true, func(t *testing.T, data, run string) {
			mkdir(t, data, 0o700)
			mkdir(t, run, 0o700)
		}, "", 0o711},
		{"data is a link", false, func(t *testing.T, data, run string) {
			mkdir(t, data+"-elsewhere", 0o700)
			symlink(t, data+"-elsewhere", data)
		}, "", 0o700},
		{"run is a link", false, func(t *testing.T, data, run string) {
			mkdir(t, run+"-elsewhere", 0o700)
			symlink(t, run+"-elsewhere", run)
		}, "not a directory", 0},
		{"run is a file", false, func(t *testing.T, data, run string) {
			if err := os.WriteFile(run, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "not a directory", 0},
		{"writable for all", false, func(t *testing.T, data, run string) { mkdir(t, run, 0o777) }, "writable for other users", 0},
		{"another user's", false, func(t *testing.T, data, run string) {
			mkdir(t, run, 0o700)
			if err := os.Chown(run, 12345, 12345); err != nil {
				t.Skip("missing capability: chown")
			}
		}, "belongs to user 12345", 0},
		{"parent is a file", false, func(t *testing.T, data, run string) {
			if err := os.WriteFile(filepath.Dir(run), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}, "cannot create directory", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			c := &Config{Server: Server{DataDir: filepath.Join(dir, "data"), RunDir: filepath.Join(dir, "deep", "run")}}
			if tt.uids {
				c.VM.UIDBase = 5000
			}
			if tt.name != "parent is a file" {
				mkdir(t, filepath.Join(dir, "deep"), 0o755)
			}
			tt.prepare(t, c.Server.DataDir, c.Server.RunDir)
			err := c.MakeDirs()
			if tt.says != "" {
				if err == nil || !strings.Contains(err.Error(), tt.says) || fault.As(err).Next == "" {
					t.Errorf("MakeDirs: %v, want %q", err, tt.says)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			for _, d := range []string{c.Server.DataDir, c.Server.RunDir} {
				st, err := os.Stat(d)
				if err != nil {
					t.Fatal(err)
				}
				if st.Mode().Perm() != tt.mode {
					t.Errorf("mode of %s is %04o, want %04o", d, st.Mode().Perm(), tt.mode)
				}
			}
		})
	}
}

func mkdir(t *testing.T, path string, mode os.FileMode) {
	t.Helper()
	if err := os.Mkdir(path, mode); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, mode); err != nil {
		t.Fatal(err)
	}
}

func symlink(t *testing.T, target, path string) {
	t.Helper()
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}
