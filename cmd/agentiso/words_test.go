package main

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/client"
)

func itoa(n int) string { return strconv.Itoa(n) }

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{
		"512": 512 << 20, "512M": 512 << 20, "512mb": 512 << 20, "512MiB": 512 << 20, "2G": 2 << 30, "1.5g": 3 << 29,
		"4096K": 4 << 20, "1T": 1 << 40, "100B": 100, " 7 ": 7 << 20,
		"": 0, "M": 0, "x": 0, "-1": 0, "-1G": 0, "0": 0, "1X": 0, "1GG": 0, "1e9": 0, "0x10": 0, "99999999999T": 0,
		"NaN": 0, "Inf": 0, "+Inf": 0, "1_000": 0, "0.0000001K": 0, "1MB5": 0, "9223372036854775807M": 0,
	} {
		got, err := parseSize(s, 1<<20)
		if got != want || (err != nil) != (want == 0) {
			t.Errorf("%q: %d, %v; not %d", s, got, err, want)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"1", "1.5G", "512MiB", "-", "1e300T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		if n, err := parseSize(s, 1<<30); err == nil && n <= 0 {
			t.Errorf("%q is %d", s, n)
		}
	})
}

func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 192 << 10: "192 KiB", 11 << 20: "11 MiB", 1 << 30: "1 GiB", 1<<30 - 1: "1 GiB", 3 << 50: "3 PiB",
	} {
		if got := formatBytes(n); got != want {
			t.Errorf("%d: %q, not %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "0 µs", 1500 * time.Microsecond: "1 ms", 1234 * time.Millisecond: "1.23 s", 90 * time.Second: "1m30s", 90 * time.Minute: "1h30m", 72 * time.Hour: "3 days",
	} {
		if got := formatDuration(d); got != want {
			t.Errorf("%v: %q, not %q", d, got, want)
		}
	}
}

func TestParseLocation(t *testing.T) {
	for s, want := range map[string]location{
		"box:/etc": {"box", "/etc"}, "box:": {"box", "."}, "box:a:b": {"box", "a:b"},
		"/a:b": {"", "/a:b"}, "./a:b": {"", "./a:b"}, "dir/a:b": {"", "dir/a:b"}, "file": {"", "file"}, "-": {"", "-"}, ":x": {"", ":x"}, "../x": {"", "../x"},
	} {
		if got := parseLocation(s); got != want {
			t.Errorf("%q: %+v, not %+v", s, got, want)
		}
	}
}

func TestEnvironment(t *testing.T) {
	t.Setenv("FROM_HERE", "h")
	file := filepath.Join(t.TempDir(), "env")
	if err := os.WriteFile(file, []byte("# comment\n\nA=1\r\n  B=two words # kept\nFROM_HERE\nNOT_SET_ANYWHERE\nE=\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := environment([]string{file}, []string{"A=2", "C=x=y", "FROM_HERE=mine"})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{"A": "2", "B": "two words # kept", "C": "x=y", "FROM_HERE": "mine", "E": ""}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []string{"=x", "a b=c", ""} {
		if _, err := environment(nil, []string{bad}); err == nil {
			t.Errorf("%q is taken", bad)
		}
	}
}

func TestProgressLine(t *testing.T) {
	p := &progress{began: time.Now(), label: "pulling x"}
	for want, now := range map[string]client.Progress{
		"| pulling x  0.0 s": {},
		"| pulling x: layers [============            ]  50% 2 MiB of 4 MiB  0.0 s": {Stage: "layers", Done: 2 << 20, Total: 4 << 20, Unit: "bytes"},
		"| pulling x: unpack  0.0 s  some text":                                     {Stage: "unpack", Log: "some\x1b text"},
		"| pulling x [========================] 100%  0.0 s":                        {Done: 9, Total: 3},
		"| pulling x 3 KiB  0.0 s":                                                  {Done: 3 << 10, Unit: "bytes"},
	} {
		p.now = now
		if got := p.line(0, 200); got != want {
			t.Errorf("%q, not %q", got, want)
		}
		if n := len([]rune(p.line(0, 20))); n > 20 {
			t.Errorf("%d characters on a narrow terminal", n)
		}
	}
}

// Output as JSON loses nothing, wherever it is cut.
func TestEventWriter(t *testing.T) {
	out, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	w := &eventWriter{a: &app{stdout: out}, name: "stdout"}
	for _, p := range []string{"caf", "\xc3", "\xa9 \xf0\x9f", "\x98\x80", "\xff\xfe", "end \xe2"} {
		if _, err := w.Write([]byte(p)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.flush(); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	want := `{"stdout":"caf"}
{"stdout":"é "}
{"stdout":"😀"}
{"stdout_base64":"//4="}
{"stdout":"end "}
{"stdout_base64":"4g=="}
`
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Error(diff)
	}
}

func TestGuestsCannotDriveTheTerminal(t *testing.T) {
	if got := clean("a\x1b[2Jb\r\x9b1mc\x00\x7f\nd\té"); got != "a[2Jb\ufffd1mc\nd\té" {
		t.Errorf("%q", got)
	}
	var b bytes.Buffer
	if n, err := (&cleanWriter{w: &b}).Write([]byte("boot\x1b[31m\r\nok\n")); n != 14 || err != nil || b.String() != "boot[31m\nok\n" {
		t.Errorf("%d, %v, %q", n, err, b.String())
	}
	b.Reset()
	c := &cleanWriter{w: &b}
	for _, piece := range []string{"a\u009b31mb\u00a0", "\xc2", "\x9b2J\xc2", "\xb5\xc2\xc2", "\x9dü\n"} {
		if n, err := c.Write([]byte(piece)); n != len(piece) || err != nil {
			t.Errorf("%q: %d, %v", piece, n, err)
		}
	}
	if got, want := b.String(), "a31mb\u00a02J\u00b5\xc2ü\n"; got != want {
		t.Errorf("%q, not %q", got, want)
	}
}

func TestImportName(t *testing.T) {
	for path, want := range map[string]string{
		"rootfs.tar.gz": "rootfs", "/x/My Image.TAR.XZ": "my-image", "dir/": "dir", "a.tgz": "a", "-": "", "...": "", "x_1.2.tar": "x_1.2",
	} {
		if got := importName(path); got != want {
			t.Errorf("%q: %q, not %q", path, got, want)
		}
	}
}
