package qemu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func tail(c *console, n int) string { return string(c.lastOutput(n)) }

func write(t *testing.T, c *console, s string) {
	t.Helper()
	if n, err := c.Write([]byte(s)); err != nil || n != len(s) {
		t.Fatalf("write: %d, %v", n, err)
	}
}

func TestConsoleRotates(t *testing.T) {
	dir := t.TempDir()
	c := openConsole(dir, "one", 10)
	if err := c.begin(true); err != nil {
		t.Fatal(err)
	}
	var all strings.Builder
	for i := range 100 {
		s := fmt.Sprintf("%03d;", i)
		write(t, c, s)
		all.WriteString(s)
		got := tail(c, 1000)
		if !strings.HasSuffix(all.String(), got) || len(got) > 20 || all.Len() > 20 && len(got) < 12 {
			t.Fatalf("after %d: kept %q", i, got)
		}
	}
	if got := tail(c, 6); got != "8;099;" {
		t.Errorf("tail %q", got)
	}
	entries, err := os.ReadDir(dir)
	if err != nil || len(entries) != 2 {
		t.Errorf("files %v, %v", entries, err)
	}
	for _, e := range entries {
		if st, err := e.Info(); err != nil || st.Size() > 10 || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", e.Name(), st, err)
		}
	}
	c.end()

	again := openConsole(dir, "one", 10) // as the next daemon finds it
	if got := tail(again, 1000); got != "096;097;098;099;" {
		t.Errorf("found %q", got)
	}
	if err := again.begin(false); err != nil {
		t.Fatal(err)
	}
	write(t, again, "x")
	if got := tail(again, 6); got != "8;099;x"[1:] {
		t.Errorf("tail %q", got)
	}
	again.end()
	if err := again.begin(true); err != nil {
		t.Fatal(err)
	}
	if got := tail(again, 100); got != "" {
		t.Errorf("a new machine's tail shows the one before: %q", got)
	}
	write(t, again, "y")
	if got := tail(again, 100); got != "y" {
		t.Errorf("tail %q", got)
	}
	again.end()
}

// TestConsoleOneBigWrite: more than the limit at once is kept whole, once.
func TestConsoleOneBigWrite(t *testing.T) {
	c := openConsole(t.TempDir(), "one", 10)
	if err := c.begin(true); err != nil {
		t.Fatal(err)
	}
	defer c.end()
	write(t, c, "ab")
	write(t, c, strings.Repeat("x", 25))
	write(t, c, "cd")
	if got := tail(c, 100); got != strings.Repeat("x", 25)+"cd" {
		t.Errorf("kept %q", got)
	}
}

// TestConsoleFullDisk: what cannot be kept is dropped and reported once, and
// the writer is never refused.
func TestConsoleFullDisk(t *testing.T) {
	c := openConsole(t.TempDir(), "one", 1000)
	if err := c.begin(true); err != nil {
		t.Fatal(err)
	}
	defer c.end()
	write(t, c, "before;")
	full, err := os.OpenFile("/dev/full", os.O_WRONLY, 0)
	if err != nil {
		t.Skip("missing capability: /dev/full")
	}
	sound := c.f
	c.f = full
	if n, err := c.Write([]byte("lost")); n != 4 || !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("first loss: %d, %v", n, err)
	}
	if n, err := c.Write([]byte("lost")); n != 4 || err != nil {
		t.Errorf("second loss: %d, %v", n, err)
	}
	full.Close()
	c.f = sound
	write(t, c, "after")
	if got := tail(c, 100); got != "before;after" {
		t.Errorf("kept %q", got)
	}
}

func TestFollow(t *testing.T) {
	w := newWorld(t, func(o *Options) { o.consoleLimit = 1 << 10 })
	p := w.start(w.spec("one"))
	w.await("console", func() bool { return len(w.Tail("one", 100)) > 0 })
	var got bytes.Buffer
	lines := make(chan struct{}, 1)
	ended := make(chan error, 1)
	go func() {
		ended <- w.Follow(t.Context(), "one", 7, func(b []byte) error {
			got.Write(b)
			if bytes.HasSuffix(b, []byte("\n")) {
				select {
				case lines <- struct{}{}:
				default:
				}
			}
			return nil
		})
	}()
	<-lines
	want := " line\r\n"
	for i := range 200 { // several rotations, read as they happen
		s := fmt.Sprint("line ", i)
		w.tell(p, "print "+s)
		want += s + "\r\n"
		<-lines
	}
	w.tell(p, "shutdown guest-reset")
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got.String()); diff != "" {
		t.Errorf("followed (-want +got):\n%s", diff)
	}

	t.Run("without a machine", func(t *testing.T) {
		var got []byte
		err := w.Follow(t.Context(), "one", 1<<20, func(b []byte) error { got = append(got, b...); return nil })
		if err != nil || !bytes.HasSuffix([]byte("fake: first"+want), got) || len(got) < 1<<10 {
			t.Errorf("%v; got %q", err, got)
		}
		err = w.Follow(t.Context(), "none", 100, func([]byte) error { t.Error("called"); return nil })
		if err != nil {
			t.Error(err)
		}
	})
	t.Run("reader's error", func(t *testing.T) {
		stop := errors.New("stop")
		if err := w.Follow(t.Context(), "one", 10, func([]byte) error { return stop }); !errors.Is(err, stop) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("canceled", func(t *testing.T) {
		w.start(w.spec("two"))
		ctx, cancel := context.WithCancel(t.Context())
		err := w.Follow(ctx, "two", 10, func([]byte) error { cancel(); return nil })
		if !errors.Is(err, context.Canceled) {
			t.Errorf("got %v", err)
		}
	})
	t.Run("removed", func(t *testing.T) {
		p := w.start(w.spec("three"))
		started, ended := make(chan struct{}, 10), make(chan error, 1)
		go func() {
			ended <- w.Follow(t.Context(), "three", 100, func([]byte) error { started <- struct{}{}; return nil })
		}()
		<-started
		if err := w.RemoveConsole("three"); err != nil {
			t.Fatal(err)
		}
		w.tell(p, "print dropped")
		if err := w.Kill(t.Context(), "three"); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if left, err := filepath.Glob(filepath.Join(w.opts.ConsoleDir, "three*")); err != nil || len(left) > 0 {
			t.Errorf("left: %v, %v", left, err)
		}
	})
	t.Run("not an id", func(t *testing.T) {
		if err := w.Follow(t.Context(), "../x", 10, func([]byte) error { return nil }); err != nil {
			t.Error(err)
		}
		if w.Tail("../x", 10) != nil || w.RemoveConsole("../x") != nil {
			t.Error("a path was taken for an id")
		}
	})
}
