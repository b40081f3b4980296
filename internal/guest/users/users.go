// Package users knows the accounts of the running guest: who a name is, where
// a path of theirs points, and how to touch files so that the kernel decides
// what they may.
//
// Accounts are read from /etc/passwd and /etc/group at every look-up, because
// users of a workspace add accounts while it runs. Both files belong to the
// guest and may be anything: what is not a regular file or is larger than
// [MaxFile] is refused, and a line that does not parse is skipped, as the C
// library does.
//
// It does not log anybody in, start processes or check passwords; package proc
// starts processes with a [User]'s ids.
package users

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// Limits of what is read. An account file of 4 MiB holds about 60,000
// accounts; NGROUPS_MAX of Linux is 65,536.
const (
	MaxFile   = 4 << 20
	maxLine   = 64 << 10
	maxGroups = 65536
	maxName   = 256
)

// ErrUnknown says that no account has the given name.
var ErrUnknown = errors.New("unknown user")

// User is one account. Groups are the supplementary groups; GID is not
// repeated in them.
type User struct {
	Name   string
	UID    uint32
	GID    uint32
	Groups []uint32
	Home   string
	Shell  string
}

// DB is a pair of account files. The zero value reads those of the running
// root; tests name their own.
type DB struct {
	Passwd string // "" is /etc/passwd
	Group  string // "" is /etc/group
}

// Lookup finds an account of the running root; see [DB.Lookup].
func Lookup(name string) (User, error) { return DB{}.Lookup(name) }

// Lookup finds an account by name, by number ("1000"), or by either with a
// primary group of its own ("1000:1000", "www:adm"), the forms of an OCI
// image's User. A number that no account has is a user all the same: group 0
// unless one is named (as container runtimes have it), home "/", shell
// "/bin/sh". root exists even where there is no /etc/passwd. Any other name
// that is not there is [ErrUnknown].
func (db DB) Lookup(name string) (User, error) {
	who, group, hasGroup := strings.Cut(name, ":")
	if !validName(who) || hasGroup && !validName(group) {
		return User{}, fmt.Errorf("look up user %.64q: %w", name, ErrUnknown)
	}
	passwd, err := readLines(db.passwd())
	if err != nil {
		return User{}, fmt.Errorf("look up user %s: %w", name, err)
	}
	groups, err := readLines(db.group())
	if err != nil {
		return User{}, fmt.Errorf("look up user %s: %w", name, err)
	}
	u, ok := findUser(passwd, who)
	if !ok {
		return User{}, fmt.Errorf("look up user %s: %w", name, ErrUnknown)
	}
	u.Groups = memberOf(groups, u)
	if hasGroup {
		gid, ok := findGroup(groups, group)
		if !ok {
			return User{}, fmt.Errorf("look up user %s: no group %s: %w", name, group, ErrUnknown)
		}
		u.GID = gid
	}
	u.Groups = slices.DeleteFunc(u.Groups, func(g uint32) bool { return g == u.GID })
	return u, nil
}

// Path is p as u means it: absolute paths are kept, "~" and "~/x" and relative
// paths start at the home. The result is cleaned. An empty p is the home.
func (u User) Path(p string) string {
	switch {
	case strings.HasPrefix(p, "/"):
		return path.Clean(p)
	case p == "~":
		p = ""
	case strings.HasPrefix(p, "~/"):
		p = p[2:]
	}
	home := u.Home
	if !strings.HasPrefix(home, "/") {
		home = "/"
	}
	return path.Join(home, p)
}

type contextKey struct{}

// NewContext returns a context that carries u as the user of a call.
func NewContext(ctx context.Context, u User) context.Context {
	return context.WithValue(ctx, contextKey{}, u)
}

// FromContext returns the user of a call.
func FromContext(ctx context.Context) (User, bool) {
	u, ok := ctx.Value(contextKey{}).(User)
	return u, ok
}

func (db DB) passwd() string {
	if db.Passwd == "" {
		return "/etc/passwd"
	}
	return db.Passwd
}

func (db DB) group() string {
	if db.Group == "" {
		return "/etc/group"
	}
	return db.Group
}

func validName(s string) bool {
	return s != "" && len(s) <= maxName && !strings.ContainsAny(s, ":\n\x00")
}

// readLines returns the file's lines that are not absurdly long, or none when
// there is no file.
func readLines(name string) ([][]byte, error) {
	// Without O_NONBLOCK a FIFO put in the file's place would hang every call.
	f, err := os.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENOTDIR) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("read %s: not a regular file", name)
	}
	b, err := io.ReadAll(io.LimitReader(f, MaxFile+1))
	if err != nil {
		return nil, err
	}
	if len(b) > MaxFile {
		return nil, fmt.Errorf("read %s: larger than %d bytes", name, MaxFile)
	}
	return splitLines(b), nil
}

func splitLines(b []byte) [][]byte {
	var lines [][]byte
	sc := bufio.NewScanner(bytes.NewReader(b))
	// The whole file is in memory, so that one long line can be skipped
	// rather than end the scan.
	sc.Buffer(nil, MaxFile+2)
	for sc.Scan() {
		if line := sc.Bytes(); len(line) > 0 && len(line) <= maxLine {
			lines = append(lines, bytes.Clone(line))
		}
	}
	return lines
}

// parsePasswd reads "name:password:uid:gid:gecos:home:shell".
func parsePasswd(line []byte) (User, bool) {
	f := strings.SplitN(string(line), ":", 8)
	if len(f) != 7 || !validName(f[0]) || strings.ContainsRune(f[5]+f[6], 0) {
		return User{}, false
	}
	uid, ok1 := parseID(f[2])
	gid, ok2 := parseID(f[3])
	if !ok1 || !ok2 {
		return User{}, false
	}
	u := User{Name: f[0], UID: uid, GID: gid, Home: f[5], Shell: f[6]}
	if u.Home == "" {
		u.Home = "/"
	}
	if u.Shell == "" {
		u.Shell = "/bin/sh"
	}
	return u, true
}

// parseGroup reads "name:password:gid:member,member".
func parseGroup(line []byte) (name string, gid uint32, members string, ok bool) {
	f := strings.SplitN(string(line), ":", 5)
	if len(f) != 4 || !validName(f[0]) {
		return "", 0, "", false
	}
	gid, ok = parseID(f[2])
	return f[0], gid, f[3], ok
}

// parseID refuses 4294967295, which the kernel reads as "leave as it is".
func parseID(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != 1<<32-1
}

func findUser(passwd [][]byte, who string) (User, bool) {
	uid, numeric := parseID(who)
	byID, found := User{}, false
	for _, line := range passwd {
		u, ok := parsePasswd(line)
		if !ok {
			continue
		}
		if u.Name == who {
			return u, true
		}
		if numeric && !found && u.UID == uid {
			byID, found = u, true
		}
	}
	switch {
	case found:
		return byID, true
	case numeric && uid != 0:
		return User{Name: who, UID: uid, Home: "/", Shell: "/bin/sh"}, true
	case numeric || who == "root":
		return User{Name: "root", Home: "/root", Shell: "/bin/sh"}, true
	}
	return User{}, false
}

func findGroup(groups [][]byte, group string) (uint32, bool) {
	for _, line := range groups {
		if name, gid, _, ok := parseGroup(line); ok && name == group {
			return gid, true
		}
	}
	return parseID(group)
}

func memberOf(groups [][]byte, u User) []uint32 {
	var gids []uint32
	for _, line := range groups {
		_, gid, members, ok := parseGroup(line)
		if !ok || len(gids) == maxGroups || slices.Contains(gids, gid) {
			continue
		}
		for m := range strings.SplitSeq(members, ",") {
			if m == u.Name {
				gids = append(gids, gid)
				break
			}
		}
	}
	return gids
}

// Names translates ids to names from one reading of the account files, for
// answers that name many owners.
type Names struct {
	users, groups map[uint32]string
}

// Names reads the account files once. What cannot be read has no names.
func (db DB) Names() *Names {
	n := &Names{users: map[uint32]string{}, groups: map[uint32]string{}}
	passwd, _ := readLines(db.passwd())
	for _, line := range passwd {
		if u, ok := parsePasswd(line); ok {
			if _, dup := n.users[u.UID]; !dup {
				n.users[u.UID] = u.Name
			}
		}
	}
	groups, _ := readLines(db.group())
	for _, line := range groups {
		if name, gid, _, ok := parseGroup(line); ok {
			if _, dup := n.groups[gid]; !dup {
				n.groups[gid] = name
			}
		}
	}
	return n
}

// User is the name of uid, or the number in digits.
func (n *Names) User(uid uint32) string {
	if s, ok := n.users[uid]; ok {
		return s
	}
	return strconv.FormatUint(uint64(uid), 10)
}

// Group is the name of gid, or the number in digits.
func (n *Names) Group(gid uint32) string {
	if s, ok := n.groups[gid]; ok {
		return s
	}
	return strconv.FormatUint(uint64(gid), 10)
}
