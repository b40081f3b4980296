package qemu

import (
	"errors"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/agentiso/agentiso/internal/domain"
)

func TestParseStat(t *testing.T) {
	rest := strings.Repeat(" 0", 18) + " 77 1 2"
	tests := []struct {
		name, in string
		want     uint64
		err      bool
	}{
		{"plain", "12 (qemu-system-x86) S" + rest, 77, false},
		{"evil name", "12 (a) R 1 2 (x) S" + rest, 77, false},
		{"zombie", "12 (q) Z" + rest, 0, true},
		{"dead", "12 (q) X" + rest, 0, true},
		{"short", "12 (q) S 1 2", 0, true},
		{"nothing", "", 0, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := parseStat([]byte(tt.in))
			if got != tt.want || err != nil != tt.err {
				t.Errorf("got %d, %v", got, err)
			}
		})
	}
}

func TestParseMark(t *testing.T) {
	tests := []struct{ name, in, want string }{
		{"ours", "/usr/bin/qemu\x00-name\x00guest=/r/m/a\x00-nodefaults\x00", "/r/m/a"},
		{"comma", "/usr/bin/qemu\x00-name\x00guest=/r,,x/m/a\x00-nodefaults\x00", "/r,x/m/a"},
		{"another place", "vi\x00x\x00-name\x00guest=/r/m/a\x00", ""},
		{"libvirt's", "qemu\x00-name\x00vm1\x00-S\x00", ""},
		{"kernel thread", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := parseMark([]byte(tt.in)); got != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("12 (q) S 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 0 77"))
	f.Add([]byte("q\x00-name\x00guest=,,,\x00x"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = parseStat(b)
		_ = parseMark(b)
	})
}

// TestHandle: a handle means one process, also after its pid has gone.
func TestHandle(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	h, err := openChecked(cmd.Process.Pid, func() bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	if h.ended() {
		t.Error("ended at once")
	}
	waited := make(chan error, 1)
	go func() { waited <- h.wait() }()
	if err := h.kill(); err != nil {
		t.Fatal(err)
	}
	if err := <-waited; err != nil {
		t.Fatal(err)
	}
	if _, err := startTicks(h.pid); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a zombie counts as alive: %v", err)
	}
	if _, err := openChecked(h.pid, func() bool { return true }); !errors.Is(err, domain.ErrNoMachine) {
		t.Errorf("open a zombie: %v", err)
	}
	if ws, ok := h.reap(); !ok || ws.Signal() != syscall.SIGKILL {
		t.Errorf("reaped %v, %v", ws, ok)
	}
	_ = cmd.Wait() // reaped already
	if err := h.kill(); err != nil {
		t.Errorf("kill what is gone: %v", err)
	}
	if _, err := openChecked(h.pid, func() bool { return true }); !errors.Is(err, domain.ErrNoMachine) {
		t.Errorf("open what is gone: %v", err)
	}

	live, err := openChecked(os.Getpid(), func() bool { return true })
	if err != nil {
		t.Fatal(err)
	}
	go func() { waited <- live.wait() }()
	live.close()
	if err := <-waited; err == nil {
		t.Error("waiting on a closed handle reports an end")
	}
}

func TestExitReason(t *testing.T) {
	killed9, exit1 := syscall.WaitStatus(9), syscall.WaitStatus(1<<8)
	panics := []byte("x\r\n[ 1.0] Kernel panic - not syncing: one\r\nmore\n[ 2.0] Kernel panic - not syncing: two\r\ntrace")
	tests := []struct {
		name     string
		shutdown string
		killed   bool
		ws       syscall.WaitStatus
		ours     bool
		console  []byte
		words    string
		want     string
	}{
		{"shutdown", "guest-shutdown", false, 0, true, panics, "", "guest shut down"},
		{"reset", "guest-reset", false, 0, true, nil, "", "guest shut down"},
		{"panic", "guest-reset", false, 0, true, panics, "", "guest kernel panic: two"},
		{"pvpanic", "guest-panic", false, 0, true, nil, "", "guest kernel panic"},
		{"cut panic", "guest-reset", false, 0, true, []byte("Kernel panic - not syncing: "), "", "guest shut down"},
		{"endless panic", "guest-reset", false, 0, true, []byte("Kernel panic - not syncing: " + strings.Repeat("y", 999)), "", "guest kernel panic: " + strings.Repeat("y", 200)},
		{"ours", "", true, killed9, true, nil, "noise", "killed"},
		{"ours, adopted", "", true, 0, false, nil, "", "killed"},
		{"quit by another", "host-qmp-quit", false, 0, true, nil, "", "stopped from the host (host-qmp-quit)"},
		{"host signal", "host-signal", false, 0, true, nil, "terminating on signal 15", "stopped from the host (host-signal); it said: terminating on signal 15"},
		{"new cause", "sub\x1bsystem", false, 0, true, nil, "", "QEMU ended: sub�system"},
		{"signal", "", false, killed9, true, nil, "", "QEMU was killed by signal 9 (SIGKILL); the host may have run out of memory"},
		{"sandbox", "", false, syscall.WaitStatus(31), true, nil, "", "QEMU was killed by signal 31 (SIGSYS); its sandbox stopped it"},
		{"crash", "", false, syscall.WaitStatus(11), true, nil, "w", "QEMU was killed by signal 11 (segmentation fault); it said: w"},
		{"status", "", false, exit1, true, nil, "w", "QEMU exited with status 1; it said: w"},
		{"nothing", "", false, 0, true, nil, "", "QEMU exited"},
		{"adopted", "", false, 0, false, nil, "w", "ended; how is unknown, as an earlier daemon had started it; it said: w"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, clean := exitReason(tt.shutdown, tt.killed, tt.ws, tt.ours, tt.console, tt.words)
			if got != tt.want || clean != (got == "guest shut down" || got == "killed") {
				t.Errorf("got %q, clean %v, want %q", got, clean, tt.want)
			}
		})
	}
}

func FuzzPanicLine(f *testing.F) {
	f.Add([]byte("Kernel panic - not syncing: \xff\x1b[2J\r\nKernel panic - not"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if s := panicLine(b); len(s) > 200*len("�") || strings.ContainsAny(s, "\x00\x1b\n\r\x07") {
			t.Errorf("%q", s)
		}
	})
}
