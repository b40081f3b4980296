package users

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const passwd = `root:x:0:0:root:/root:/bin/bash
# a comment
broken line
daemon:x:1:1
user:x:1000:1000:,,,:/home/user:/bin/bash
again:x:1000:7:second of the id:/srv:/bin/sh
bare:x:1001:1001:::
minus:x:4294967295:0:::
big:x:4294967296:0:::
neg:x:-1:0:::
`

const group = `root:x:0:
adm:x:4:user,daemon
tty:x:5:user
dup:x:4:user
user:x:1000:user
nogroup:x:65534:
bad:x:what:user
`

func testDB(t *testing.T, passwd, group string) DB {
	t.Helper()
	dir := t.TempDir()
	db := DB{Passwd: filepath.Join(dir, "passwd"), Group: filepath.Join(dir, "group")}
	for name, text := range map[string]string{db.Passwd: passwd, db.Group: group} {
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return db
}

func TestLookup(t *testing.T) {
	db := testDB(t, passwd, group)
	user := User{Name: "user", UID: 1000, GID: 1000, Groups: []uint32{4, 5}, Home: "/home/user", Shell: "/bin/bash"}
	tests := []struct {
		name string
		want User
		err  error
	}{
		{"root", User{Name: "root", Home: "/root", Shell: "/bin/bash"}, nil},
		{"user", user, nil},
		{"1000", user, nil},
		{"user:adm", User{Name: "user", UID: 1000, GID: 4, Groups: []uint32{5, 1000}, Home: "/home/user", Shell: "/bin/bash"}, nil},
		{"1000:1000", user, nil},
		{"bare", User{Name: "bare", UID: 1001, GID: 1001, Home: "/", Shell: "/bin/sh"}, nil},
		{"4242", User{Name: "4242", UID: 4242, Home: "/", Shell: "/bin/sh"}, nil},
		{"4242:65534", User{Name: "4242", UID: 4242, GID: 65534, Home: "/", Shell: "/bin/sh"}, nil},
		{"daemon", User{}, ErrUnknown},
		{"minus", User{}, ErrUnknown},
		{"big", User{}, ErrUnknown},
		{"neg", User{}, ErrUnknown},
		{"4294967295", User{}, ErrUnknown},
		{"-1", User{}, ErrUnknown},
		{"nobody here", User{}, ErrUnknown},
		{"user:none", User{}, ErrUnknown},
		{"user:", User{}, ErrUnknown},
		{"", User{}, ErrUnknown},
		{":", User{}, ErrUnknown},
		{"a\nb", User{}, ErrUnknown},
		{strings.Repeat("u", 300), User{}, ErrUnknown},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := db.Lookup(tt.name)
			if !errors.Is(err, tt.err) {
				t.Fatalf("error %v, want %v", err, tt.err)
			}
			if got.Groups = append([]uint32(nil), got.Groups...); !cmp.Equal(tt.want, got) {
				t.Error(cmp.Diff(tt.want, got))
			}
		})
	}
}

func TestLookupOddFiles(t *testing.T) {
	dir := t.TempDir()
	t.Run("none", func(t *testing.T) {
		db := DB{Passwd: filepath.Join(dir, "none"), Group: filepath.Join(dir, "none")}
		if u, err := db.Lookup("root"); err != nil || u.UID != 0 || u.Home != "/root" {
			t.Errorf("root without account files: %+v, %v", u, err)
		}
		if _, err := db.Lookup("user"); !errors.Is(err, ErrUnknown) {
			t.Errorf("error %v, want ErrUnknown", err)
		}
	})
	t.Run("fifo", func(t *testing.T) {
		fifo := filepath.Join(dir, "fifo")
		if err := syscall.Mkfifo(fifo, 0o644); err != nil {
			t.Fatal(err)
		}
		if _, err := (DB{Passwd: fifo}).Lookup("root"); err == nil {
			t.Error("a FIFO was read")
		}
	})
	t.Run("large", func(t *testing.T) {
		if _, err := testDB(t, strings.Repeat("x", MaxFile+1), "").Lookup("root"); err == nil {
			t.Error("a file over the limit was read")
		}
	})
	t.Run("long line", func(t *testing.T) {
		db := testDB(t, "a:x:5:5::/:"+strings.Repeat("x", maxLine)+"\nb:x:6:6::/:\n", "")
		if _, err := db.Lookup("a"); !errors.Is(err, ErrUnknown) {
			t.Errorf("long line: error %v, want ErrUnknown", err)
		}
		if u, err := db.Lookup("b"); err != nil || u.UID != 6 {
			t.Errorf("line after the long one: %+v, %v", u, err)
		}
	})
}

func TestPath(t *testing.T) {
	u := User{Home: "/home/user"}
	for in, want := range map[string]string{
		"":             "/home/user",
		"~":            "/home/user",
		"~/":           "/home/user",
		"~/a/../b":     "/home/user/b",
		"a//b":         "/home/user/a/b",
		".":            "/home/user",
		"../x":         "/home/x",
		"../../../x":   "/x",
		"/etc/../x":    "/x",
		"/":            "/",
		"~other/x":     "/home/user/~other/x",
		"../../../../": "/",
	} {
		if got := u.Path(in); got != want {
			t.Errorf("Path(%q) = %q, want %q", in, got, want)
		}
	}
	if got := (User{Home: "odd"}).Path("x"); got != "/x" {
		t.Errorf("relative home: %q, want /x", got)
	}
}

func TestContext(t *testing.T) {
	if _, ok := FromContext(context.Background()); ok {
		t.Error("a bare context has a user")
	}
	want := User{Name: "user", UID: 1000}
	if got, ok := FromContext(NewContext(context.Background(), want)); !ok || !cmp.Equal(want, got) {
		t.Errorf("got %+v, %v", got, ok)
	}
}

func TestNames(t *testing.T) {
	n := testDB(t, passwd, group).Names()
	for got, want := range map[string]string{
		n.User(1000): "user", n.User(7): "7", n.Group(4): "adm", n.Group(77): "77",
	} {
		if got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

func FuzzLookup(f *testing.F) {
	f.Add(passwd, group, "user")
	f.Add("::::::\n:x:0:0:::", ":::\n\x00", "1:1")
	f.Add(strings.Repeat(":", 100), strings.Repeat(",", 100), "0")
	f.Fuzz(func(t *testing.T, passwd, group, name string) {
		lines, groups := splitLines([]byte(passwd)), splitLines([]byte(group))
		u, ok := findUser(lines, name)
		if !ok {
			return
		}
		if u.UID == noID || u.GID == noID {
			t.Errorf("id that the kernel does not know: %+v", u)
		}
		for _, g := range memberOf(groups, u) {
			if g == noID {
				t.Error("group that the kernel does not know")
			}
		}
		if p := u.Path(name); !strings.HasPrefix(p, "/") {
			t.Errorf("path %q is not absolute", p)
		}
	})
}
