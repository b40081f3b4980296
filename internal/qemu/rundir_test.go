package qemu

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/agentiso/agentiso/internal/fault"
)

func TestTrimLog(t *testing.T) {
	d := runDir(filepath.Join(t.TempDir(), "m"))
	if err := d.trimLog(100, 20); err != nil {
		t.Errorf("no log: %v", err)
	}
	if err := d.make(); err != nil {
		t.Fatal(err)
	}
	log, err := d.openLog()
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	for i := range 50 {
		fmt.Fprintf(log, "line %02d\n", i)
		if err := d.trimLog(100, 20); err != nil {
			t.Fatal(err)
		}
		st, err := log.Stat()
		if err != nil || st.Size() > 100 {
			t.Fatalf("log has %d bytes, %v", st.Size(), err)
		}
	}
	if got := d.lastWords(); !strings.HasSuffix(got, "line 47; line 48; line 49") {
		t.Errorf("last words %q", got)
	}
}

func TestLastWords(t *testing.T) {
	d := runDir(t.TempDir())
	if got := d.lastWords(); got != "" {
		t.Errorf("without a log: %q", got)
	}
	text := strings.Repeat("x\n", 5000) +
		"2026-11-23T18:32:53.123456Z qemu-system-x86_64: -drive file=a: bad\x1b[31m\xff thing\r\n\n2026-11-23T18:32:53.123456Z warning: more\n"
	if err := os.WriteFile(d.path(qemuLog), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	got := d.lastWords()
	if want := "x; x; -drive file=a: bad�[31m� thing; warning: more"; !strings.HasSuffix(got, want) || len(got) > 4*lastWords {
		t.Errorf("got %q", got)
	}
}

func TestParseVersion(t *testing.T) {
	tests := []struct {
		in           string
		major, minor int
		version      string
	}{
		{"QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)\nCopyright", 7, 2, "7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)"},
		{"QEMU emulator version 10.0.0\n", 10, 0, "10.0.0"},
		{"QEMU emulator version 9.2-rc1", 9, 2, "9.2-rc1"},
	}
	for _, tt := range tests {
		b, err := parseVersion(tt.in)
		if err != nil || b.Major != tt.major || b.Minor != tt.minor || b.Version != tt.version {
			t.Errorf("%q: %+v, %v", tt.in, b, err)
		}
	}
	for _, in := range []string{"", "hello", "QEMU emulator version x", "QEMU emulator version 99999.1"} {
		if b, err := parseVersion(in); err == nil {
			t.Errorf("%q: %+v", in, b)
		}
	}
}

func TestOldQEMU(t *testing.T) {
	path := filepath.Join(t.TempDir(), "qemu")
	say := func(version string) {
		script := "#!/bin/sh\necho 'QEMU emulator version " + version + "'\n"
		if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	b := binary{name: path}
	for version, ok := range map[string]bool{"6.2.0": false, "7.1.0-x": false, "7.2.0": true, "8.0.000": true, "10.0.00": true} {
		say(version + strings.Repeat(" ", len(version))) // a different size each time, or the answer may be remembered
		_, err := b.find(t.Context())
		if ok && err != nil || !ok && !fault.Is(err, fault.Missing) {
			t.Errorf("%s: %v", version, err)
		}
	}
}
