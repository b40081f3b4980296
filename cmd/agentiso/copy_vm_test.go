//go:build vm

package main

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/agentiso/agentiso/client"
)

// testCopy carries a tree with a large file into a guest and back, and
// compares contents, modes, times and links at both ends.
func testCopy(t *testing.T, c *client.Client) {
	src := filepath.Join(t.TempDir(), "tree")
	big := make([]byte, 64<<20)
	fillRandom(big)
	for name, file := range map[string]struct {
		mode fs.FileMode
		data []byte
	}{
		"big":                  {0o644, big},
		"empty":                {0o600, nil},
		"bin/tool":             {0o755, []byte("#!/bin/sh\necho tool\n")},
		"read only/a b":        {0o444, []byte("spaces")},
		"deep/er/and/deeper/x": {0o640, []byte("x")},
		"übung \"quoted\" $x":  {0o644, []byte("odd name")},
		"-rf":                  {0o644, []byte("an option?")},
	} {
		path := filepath.Join(src, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, file.data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, file.mode); err != nil {
			t.Fatal(err)
		}
	}
	for link, target := range map[string]string{"bin/link": "tool", "dangling": "/no/where", "up": "deep/er"} {
		if err := os.Symlink(target, filepath.Join(src, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(src, "hollow"), 0o700); err != nil {
		t.Fatal(err)
	}
	old := time.Date(2020, 2, 29, 12, 0, 0, 0, time.UTC)
	if err := os.Chtimes(filepath.Join(src, "bin/tool"), old, old); err != nil {
		t.Fatal(err)
	}

	in, err := c.CopyTo(t.Context(), "dev", src, "copies/tree", client.CopyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	inside := output(t, c, "dev", client.ExecOptions{Workdir: "/home/user/copies/tree"}, "/bin/sh", "-c", `
		sha256sum big | cut -d " " -f 1
		stat -c "%a %U %Y %n" bin/tool "read only/a b" hollow
		readlink bin/link dangling up
		./bin/link
		find . | wc -l`)
	want := fmt.Sprintf("%s\n755 user %d bin/tool\n", hashOf(big), old.Unix())
	if !strings.HasPrefix(inside, want) || !strings.HasSuffix(inside, "tool\n/no/where\ndeep/er\ntool\n18") {
		t.Errorf("inside there is\n%s\nnot\n%s…", inside, want)
	}

	back := filepath.Join(t.TempDir(), "back")
	out, err := c.CopyFrom(t.Context(), "dev", "copies/tree", back, client.CopyOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(describeTree(t, src), describeTree(t, back)); d != "" {
		t.Errorf("what went in is not what came back (-in +back):\n%s", d)
	}
	if in.Bytes != out.Bytes || in.Files != out.Files || in.Bytes < int64(len(big)) {
		t.Errorf("in went %+v, back came %+v", in, out)
	}

	// What cannot be copied says so, and the guest's user is who writes.
	_, err = c.CopyTo(t.Context(), "dev", filepath.Join(src, "bin/tool"), "/usr/bin/tool", client.CopyOptions{})
	if client.KindOf(err) != client.Unauthorized {
		t.Errorf("a copy to where the user may not write: %v", err)
	}
	_, err = c.CopyFrom(t.Context(), "dev", "/root/.profile", back, client.CopyOptions{})
	if client.KindOf(err) != client.Unauthorized {
		t.Errorf("a copy of what the user may not read: %v", err)
	}
	_, err = c.CopyTo(t.Context(), "dev", src, "/etc/passwd", client.CopyOptions{User: "root"})
	if client.KindOf(err) != client.Invalid {
		t.Errorf("a copy of a directory onto a file: %v", err)
	}
	// A guest's disk that is full: here one of a megabyte.
	sh(t, c, "a", "mkdir -p /mnt/small && mount -t tmpfs -o size=1m none /mnt/small")
	_, err = c.CopyTo(t.Context(), "a", filepath.Join(src, "big"), "/mnt/small/big", client.CopyOptions{})
	if client.KindOf(err) != client.NoSpace {
		t.Errorf("a copy to a full disk: %v (%s)", err, client.KindOf(err))
	}
}

// describeTree tells everything of a tree that a copy keeps.
func describeTree(t *testing.T, root string) map[string]string {
	t.Helper()
	tree := map[string]string{}
	err := filepath.WalkDir(root, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := strings.TrimPrefix(path, root)
		st, err := os.Lstat(path)
		if err != nil {
			return err
		}
		switch {
		case e.Type() == fs.ModeSymlink:
			tree[name], err = os.Readlink(path)
		case e.IsDir():
			tree[name] = st.Mode().String()
		default:
			var b []byte
			b, err = os.ReadFile(path)
			tree[name] = fmt.Sprint(st.Mode(), st.ModTime().Unix(), hashOf(b))
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
