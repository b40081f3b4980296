package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/agentiso/agentiso/internal/domain"
	"github.com/agentiso/agentiso/internal/server/servertest"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"agentiso": func() { os.Exit(execute(context.Background(), os.Args[1:])) },
	})
}

// TestScript runs the command line's scripts. Besides the usual commands they
// have
//
//	fake               start a daemon in the test's process, over fakes
//	fake crash REF     end a workspace's machine
//	fake entry ARG...  give the default image an entrypoint
//	status N CMD...    run a command, which must leave with N
//	anystatus CMD...   run a command, whose exit code depends on the host
//	stalesocket PATH   leave a socket that nobody listens on
//
// The environment has no daemon, no configuration and directories of its own.
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script",
		Setup: func(e *testscript.Env) error {
			for _, v := range []string{"AGENTISO_SOCKET", "AGENTISO_CONFIG", "XDG_RUNTIME_DIR"} {
				e.Setenv(v, "")
			}
			home := filepath.Join(e.WorkDir, "home")
			e.Setenv("HOME", home)
			e.Setenv("XDG_CONFIG_HOME", filepath.Join(home, "config"))
			e.Setenv("DOCKER_CONFIG", filepath.Join(home, "docker"))
			e.Values[fakeKey{}] = new(*servertest.Daemon)
			// Also where root's daemon would be is out of the way.
			e.Setenv("AGENTISO_SERVER_DATA_DIR", filepath.Join(home, "data"))
			e.Setenv("AGENTISO_SERVER_RUN_DIR", filepath.Join(home, "run"))
			e.Setenv("AGENTISO_SERVER_SOCKET", filepath.Join(home, "none.sock"))
			return os.MkdirAll(home, 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"fake":   fakes(t),
			"status": status, "anystatus": anyStatus, "stalesocket": staleSocket,
		},
	})
}

// fakes keeps one fake daemon for each script.
func fakes(t *testing.T) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, _ bool, args []string) {
		d, started := ts.Value(fakeKey{}).(**servertest.Daemon)
		if !started {
			ts.Fatalf("no place for a fake daemon")
		}
		switch {
		case len(args) == 0:
			*d = servertest.Start(t, nil)
			ts.Setenv("AGENTISO_SOCKET", (*d).Socket)
		case args[0] == "crash":
			(*d).Workspaces.Crash(args[1])
		case args[0] == "entry":
			(*d).Images.Set("dev", func(i *domain.Image) { i.Entrypoint = args[1:] })
		default:
			ts.Fatalf("fake %v is not known", args)
		}
	}
}

type fakeKey struct{}

// status runs a command and checks its exit code: status 127 agentiso run …
func status(ts *testscript.TestScript, _ bool, args []string) {
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	err = ts.Exec(args[1], args[2:]...)
	got := 0
	if err != nil {
		s := err.Error()
		n, ok := strings.CutPrefix(s, "exit status ")
		if !ok {
			ts.Fatalf("%v: %v", args[1:], err)
		}
		got, err = strconv.Atoi(n)
		ts.Check(err)
	}
	if got != want {
		ts.Fatalf("%v: exit code %d, not %d", args[1:], got, want)
	}
}

// anyStatus runs a command whose exit code depends on the host.
func anyStatus(ts *testscript.TestScript, _ bool, args []string) {
	_ = ts.Exec(args[0], args[1:]...)
}

// staleSocket leaves a socket that nobody listens on.
func staleSocket(ts *testscript.TestScript, _ bool, args []string) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: args[0], Net: "unix"})
	ts.Check(err)
	l.SetUnlinkOnClose(false)
	ts.Check(l.Close())
}
